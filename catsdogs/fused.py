"""A ResNet50's backbone on a CPU whose convolutions also add and rectify: one pass over memory instead of three.

Additions and rectifications take half of the time of the plain layers (2 cores with AMX, bf16, 2026-11: 154 images/s
where those do 70). The operators are oneDNN's, as torch's compiler uses them (`torch/_inductor/fx_passes/
mkldnn_fusion.py`), without its compile time. They are not torch's public interface, hence the trial before.

Shapes: N batch, C channels, H, W.
"""

import functools
from typing import cast

import torch
from torch import nn

from catsdogs.vision import Bottleneck, ResNet

MOST_ERROR = 0.02  # of the trial, whose values are around one


class _Conv(nn.Module):
    """A convolution, then a rectification where asked for."""

    def __init__(self, conv: nn.Conv2d, rectified: bool) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self._after = "relu" if rectified else "none"

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        outputs_NCHW: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            inputs_NCHW, self.weight, self.bias, *self._geometry, self._after, [], ""
        )
        return outputs_NCHW

    def onto(self, sums_NCHW: torch.Tensor, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        """Add to `sums_NCHW`, in place, and rectify."""
        outputs_NCHW: torch.Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            sums_NCHW, inputs_NCHW, self.weight, self.bias, *self._geometry, "add", 1.0, "relu", [], ""
        )
        return outputs_NCHW


class _Block(nn.Module):
    """A bottleneck block; what comes in is overwritten where it is what the block adds to."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self._conv1, self._conv2 = _Conv(block.conv1, rectified=True), _Conv(block.conv2, rectified=True)
        self._conv3 = _Conv(block.conv3, rectified=False)
        self._downsample = None if block.downsample is None else _Conv(block.downsample[0], rectified=False)

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        inner_NCHW = self._conv2(self._conv1(inputs_NCHW))
        sums_NCHW = inputs_NCHW if self._downsample is None else self._downsample(inputs_NCHW)
        return self._conv3.onto(sums_NCHW, inner_NCHW)


def fused(backbone: ResNet) -> nn.Module:
    """Fuse a backbone whose BatchNorm is folded, on a CPU and in channels last; as it is where that cannot be.

    Returns:
        Maps (N, 3, H, W) to (N, NUM_FEATURES), without gradients.
    """
    if not _works(backbone.conv1.weight.dtype):
        return cast(nn.Module, backbone)
    layers = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    blocks = [_Block(block) for layer in layers for block in layer]
    first = _Conv(backbone.conv1, rectified=True)
    return nn.Sequential(first, backbone.maxpool, *blocks, backbone.avgpool, nn.Flatten(1))


@functools.cache
@torch.inference_mode()
def _works(dtype: torch.dtype) -> bool:
    """Try both operators beside the plain layers: other builds and CPUs may lack them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
        inputs_NCHW, sums_NCHW = torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8)
    expected = plain(inputs_NCHW).relu(), (plain(inputs_NCHW) + sums_NCHW).relu()
    inputs_NCHW, sums_NCHW = (
        tensor.to(dtype, memory_format=torch.channels_last) for tensor in (inputs_NCHW, sums_NCHW)
    )
    try:
        conv = _Conv(plain.to(dtype).to(memory_format=torch.channels_last), rectified=True)
        found = conv(inputs_NCHW), conv.onto(sums_NCHW, inputs_NCHW)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(float((f.float() - e).abs().max()) <= MOST_ERROR for f, e in zip(found, expected, strict=True))
