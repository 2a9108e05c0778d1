"""ResNet50's backbone for inference, built from a checkpoint's tensors.

BatchNorm is folded into the convolutions, which is exact up to rounding (Jacob et al., arXiv 1712.05877, section 3.2).
The residual add and the ReLU run inside the convolutions: one pass over memory instead of three.

The fused operators are not documented, and those for CPUs are private. torch's compiler uses them, too
(torch/_inductor/fx_passes/mkldnn_fusion.py).
- Gain, measured 2026-11 in bf16: 154 images/s instead of 70 on 2 cores with AMX, 23,170 instead of 11,370 on an H100.
- Fallback: if a trial shows that an operator is missing or inaccurate, `F.conv2d`, add and ReLU run one by one.
- Switch: CATSDOGS_PLAIN_CONV=1 selects the plain operators.
- Delete the two fused classes once torch documents a convolution with add and ReLU; a test fails then.

Shapes: N batch, C channels, H, W, D features.
"""

import functools
import logging
import math
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from catsdogs.checkpoint import HEAD
from catsdogs.process_setup import DTYPES, Precision
from catsdogs.resnet import Bottleneck, ResNet50

MAX_TRIAL_ERROR = 0.02  # for outputs around 1, in bf16
PLAIN_CONV_VARIABLE = "CATSDOGS_PLAIN_CONV"

logger = logging.getLogger(__name__)


class PlainConv:
    """A convolution by documented operators, padded by half its kernel size."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, stride: int) -> None:
        self._weight, self._bias = weight, bias
        self._padding, self._stride = [size // 2 for size in weight.shape[2:]], [stride, stride]

    def __call__(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute conv(inputs)."""
        return F.conv2d(inputs_NCHW, self._weight, self._bias, self._stride, self._padding)

    def relu(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute ReLU(conv(inputs))."""
        return self(inputs_NCHW).relu_()

    def add_relu(self, inputs_NCHW: torch.Tensor, residual_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute ReLU(conv(inputs) + residual); may overwrite `residual_NCHW`."""
        return self(inputs_NCHW).add_(residual_NCHW).relu_()


class FusedCpuConv(PlainConv):
    """A convolution by oneDNN's fused operators."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, stride: int) -> None:
        super().__init__(weight, bias, stride)
        self._arguments = (weight, bias, self._padding, self._stride, [1, 1], 1)  # the last two: dilation and groups

    def relu(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        operator = torch.ops.mkldnn._convolution_pointwise
        return operator(inputs_NCHW, *self._arguments, "relu", [], "")  # type: ignore[no-any-return]

    def add_relu(self, inputs_NCHW: torch.Tensor, residual_NCHW: torch.Tensor) -> torch.Tensor:
        operator = torch.ops.mkldnn._convolution_pointwise_.binary
        return operator(residual_NCHW, inputs_NCHW, *self._arguments, "add", 1.0, "relu", [], "")  # type: ignore[no-any-return]


class FusedGpuConv(PlainConv):
    """A convolution by cuDNN's fused operators."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, stride: int) -> None:
        super().__init__(weight, bias, stride)
        self._arguments = (bias, self._stride, self._padding, [1, 1], 1)  # the last two: dilation and groups

    def relu(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.cudnn_convolution_relu(inputs_NCHW, self._weight, *self._arguments)

    def add_relu(self, inputs_NCHW: torch.Tensor, residual_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.cudnn_convolution_add_relu(inputs_NCHW, self._weight, residual_NCHW, 1.0, *self._arguments)


FUSED_CONVS: dict[str, type[PlainConv]] = {"cpu": FusedCpuConv, "cuda": FusedGpuConv}  # by device type


class InferenceBackbone:
    """All layers but the head, in the memory format channels_last."""

    def __init__(
        self, state_dict: Mapping[str, torch.Tensor], precision: Precision, device: torch.device, plain: bool = False
    ) -> None:
        """Fold and convert a copy of a ResNet50's tensors; `plain` uses documented operators only."""
        dtype = DTYPES[precision]
        conv_type = PlainConv if plain else select_conv_type(dtype, device)

        def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> PlainConv:
            weight, bias = (tensor.detach().to(device, dtype) for tensor in fuse_conv_bn_eval(conv, norm).parameters())
            return conv_type(weight.contiguous(memory_format=torch.channels_last), bias, conv.stride[0])

        with torch.device("meta"):  # without allocating weights
            model = ResNet50(len(state_dict[f"{HEAD}.bias"])).eval()
        model.load_state_dict(state_dict, strict=False, assign=True)  # BatchNorm's batch counters may be missing
        self._stem = fold(model.conv1, model.bn1)
        self._blocks = [
            (
                fold(block.conv1, block.bn1),
                fold(block.conv2, block.bn2),
                fold(block.conv3, block.bn3),
                None if block.downsample is None else fold(*block.downsample),
            )
            for block in model.modules()
            if isinstance(block, Bottleneck)
        ]

    def __call__(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute the features (N, NUM_FEATURES) of normalized images (N, 3, H, W), in the backbone's precision."""
        return F.adaptive_avg_pool2d(self.extract(images_NCHW), 1).flatten(1)

    def extract(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute the features before the pooling, (N, NUM_FEATURES, H / 32, W / 32)."""
        outputs_NCHW = F.max_pool2d(self._stem.relu(images_NCHW), kernel_size=3, stride=2, padding=1)
        for conv1, conv2, conv3, downsample in self._blocks:
            branch_NCHW = conv2.relu(conv1.relu(outputs_NCHW))
            residual_NCHW = outputs_NCHW if downsample is None else downsample(outputs_NCHW)
            outputs_NCHW = conv3.add_relu(branch_NCHW, residual_NCHW)
        return outputs_NCHW


def select_conv_type(dtype: torch.dtype, device: torch.device) -> type[PlainConv]:
    """Select the fused operators of a device if they work, else the plain ones."""
    fused = FUSED_CONVS.get(device.type, PlainConv)
    if os.environ.get(PLAIN_CONV_VARIABLE) == "1" or fused is PlainConv:
        return PlainConv
    if device.type == "cuda" and dtype == torch.float32:  # cuDNN's fused operators would compute in TF32
        return PlainConv
    return fused if passes_trial(fused, dtype, device) else PlainConv  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def passes_trial(conv_type: type[PlainConv], dtype: torch.dtype, device: torch.device) -> bool:
    """Compare a type with PlainConv in fp32; builds of torch and processors may lack its operators."""
    try:
        error = _measure_trial_error(conv_type, dtype, device)
    except (AttributeError, RuntimeError, TypeError):
        logger.debug("trial of %s failed", conv_type.__name__, exc_info=True)
        error = math.inf
    if error <= MAX_TRIAL_ERROR:  # false for NaN
        return True
    name = conv_type.__name__
    logger.warning("%s does not work in %s on %s; using plain convolutions, which are slower", name, dtype, device)
    return False


@torch.inference_mode()
def _measure_trial_error(conv_type: type[PlainConv], dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight, inputs_NCHW, residual_NCHW = (
        torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
        for shape in ((32, 32, 3, 3), (2, 32, 8, 8), (2, 32, 8, 8))
    )

    def compute(conv_type: type[PlainConv], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        bias = torch.linspace(-0.1, 0.1, 32)
        conv = conv_type((weight * 0.03).to(device, dtype), bias.to(device, dtype), stride=1)
        inputs, residual = inputs_NCHW.to(device, dtype), residual_NCHW.to(device, dtype, copy=True)
        return torch.stack([conv.relu(inputs), conv.add_relu(inputs, residual)]).float().cpu()

    expected = compute(PlainConv, torch.float32, torch.device("cpu"))
    return float((compute(conv_type, dtype, device) - expected).abs().max())
