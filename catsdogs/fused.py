"""A ResNet50's backbone whose convolutions also add and rectify: one pass over memory instead of three.

Additions and rectifications take half of the time of the plain layers. In bf16 these operators make 154 images/s where
those make 70 (2 cores with AMX, 2026-11), and 23,170 where those make 11,370 and torch's compiler, after 46 s, 22,500
(H100, batches of 256). They are oneDNN's, as that compiler uses them (`torch/_inductor/fx_passes/mkldnn_fusion.py`),
and cuDNN's. They are not torch's public interface, hence the trial before.

Shapes: N batch, C channels, H, W.
"""

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from catsdogs.vision import Bottleneck, ResNet

MAX_ERROR = 0.02  # of the trial, whose values are around one


class _Conv(nn.Module):
    """A convolution, then a rectification where asked for; oneDNN's."""

    def __init__(self, conv: nn.Conv2d, rectified: bool) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry: tuple[Any, ...] = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self._rectified = rectified

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        after = "relu" if self._rectified else "none"
        outputs_NCHW: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            inputs_NCHW, self.weight, self.bias, *self._geometry, after, [], ""
        )
        return outputs_NCHW

    def onto(self, sums_NCHW: torch.Tensor, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        """Add to `sums_NCHW`, which may be overwritten, and rectify."""
        outputs_NCHW: torch.Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            sums_NCHW, inputs_NCHW, self.weight, self.bias, *self._geometry, "add", 1.0, "relu", [], ""
        )
        return outputs_NCHW


class _CudnnConv(_Conv):
    """The same by cuDNN, which takes the stride before the padding."""

    def __init__(self, conv: nn.Conv2d, rectified: bool) -> None:
        super().__init__(conv, rectified)
        self._geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        convolve = torch.cudnn_convolution_relu if self._rectified else F.conv2d
        outputs_NCHW: torch.Tensor = convolve(inputs_NCHW, self.weight, self.bias, *self._geometry)
        return outputs_NCHW

    def onto(self, sums_NCHW: torch.Tensor, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        """Add to `sums_NCHW` and rectify."""
        summed: torch.Tensor = torch.cudnn_convolution_add_relu(
            inputs_NCHW, self.weight, sums_NCHW, 1.0, self.bias, *self._geometry
        )
        return summed


CONVS = {"cpu": _Conv, "cuda": _CudnnConv}  # by device


class _Block(nn.Module):
    """A bottleneck block; what comes in is overwritten where it is what the block adds to."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        conv = CONVS[block.conv1.weight.device.type]
        self._conv1, self._conv2 = conv(block.conv1, rectified=True), conv(block.conv2, rectified=True)
        self._conv3 = conv(block.conv3, rectified=False)
        self._downsample = None if block.downsample is None else conv(block.downsample[0], rectified=False)

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        inner_NCHW = self._conv2(self._conv1(inputs_NCHW))
        sums_NCHW = inputs_NCHW if self._downsample is None else self._downsample(inputs_NCHW)
        return self._conv3.onto(sums_NCHW, inner_NCHW)


def fused(backbone: ResNet) -> nn.Module:
    """Fuse a backbone whose BatchNorm is folded, in channels last; as it is where that cannot be.

    Returns:
        Maps (N, 3, H, W) to (N, NUM_FEATURES), without gradients.
    """
    weight = backbone.conv1.weight
    if not _works(weight.dtype, weight.device):
        return cast(nn.Module, backbone)
    layers = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    blocks = [_Block(block) for layer in layers for block in layer]
    first = CONVS[weight.device.type](backbone.conv1, rectified=True)
    return nn.Sequential(first, backbone.maxpool, *blocks, backbone.avgpool, nn.Flatten(1))


@functools.cache
@torch.inference_mode()
def _works(dtype: torch.dtype, device: torch.device) -> bool:
    """Try both operators beside the plain layers: other builds and processors may lack them."""
    if device.type == "cuda" and dtype == torch.float32:  # they would take TF32
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
        inputs_NCHW, sums_NCHW = torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8)
    expected = plain(inputs_NCHW).relu(), (plain(inputs_NCHW) + sums_NCHW).relu()
    inputs_NCHW, sums_NCHW = (
        tensor.to(device, dtype, memory_format=torch.channels_last) for tensor in (inputs_NCHW, sums_NCHW)
    )
    try:
        conv = CONVS[device.type](plain.to(device, dtype).to(memory_format=torch.channels_last), rectified=True)
        found = conv(inputs_NCHW), conv.onto(sums_NCHW, inputs_NCHW)
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return False
    return all(float((f.float().cpu() - e).abs().max()) <= MAX_ERROR for f, e in zip(found, expected, strict=True))
