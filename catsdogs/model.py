"""ResNet50 with our head, what of it trains, the form it takes for inference.

Shapes: N batch, C channels, H, W, K classes.
"""

import copy
import functools
import time
from typing import Literal, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from catsdogs.vision import Bottleneck, ResNet, resnet50

HEAD = "fc"
NUM_FEATURES = 2048  # that the head sees
Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_CAPABILITY = (8, 0)  # of a GPU with tensor cores for it
MIN_BF16_SPEEDUP = 1.15  # of bf16 over fp32 that is worth its rounding
PROBE_RUNS = 6  # the fastest counts: what shares a core and its caches only makes one slower


def build(num_classes: int, seed: int) -> ResNet:
    """Make a randomly initialised ResNet50; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(ResNet, resnet50(weights=None, num_classes=num_classes))


def freeze_backbone(model: ResNet) -> None:
    """Leave the head alone to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(f"{HEAD}.")


def training_mode(model: ResNet, num_rows: int) -> None:
    """Switch to training; of fewer than two rows BatchNorm cannot learn a variance, and its statistics stay still."""
    model.train(num_rows >= 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group what trains: weight matrices decay, norms and biases (one dimension) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """Choose bf16 where this device computes with it faster than with fp32; of a CPU that is measured, in 0.3 s."""
    if precision != "auto":
        return cast(Precision, precision)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else "fp32"
    return "bf16" if measure_bf16_speedup() >= MIN_BF16_SPEEDUP else "fp32"


@functools.cache
def measure_bf16_speedup() -> float:
    """Measure how many times faster a convolution from the middle of ResNet50 is in bf16 on a core of this CPU."""
    tried = {dtype: _Probe(dtype) for dtype in (torch.float32, torch.bfloat16)}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # this one, which counts its own time: others may be at work on the same cores
    try:
        times = [{dtype: probe.run_s() for dtype, probe in tried.items()} for _ in range(PROBE_RUNS)]
    finally:
        torch.set_num_threads(num_threads)
    fp32_s, bf16_s = (min(run[dtype] for run in times) for dtype in tried)
    return fp32_s / bf16_s


class _Probe:
    """A convolution whose run takes about 10 ms on one core."""

    def __init__(self, dtype: torch.dtype) -> None:
        images_NCHW = torch.ones((8, 256, 14, 14), dtype=dtype)
        conv = nn.Conv2d(256, 256, 3, padding=1, bias=False, dtype=dtype)
        self._images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
        self._conv = conv.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run_s(self) -> float:
        """Compute once; the seconds that this thread took."""
        began = time.thread_time()
        self._conv(self._images_NCHW)
        return time.thread_time() - began


def disable_tf32(precision: str, device: torch.device) -> None:
    """Keep fp32 what it says on a GPU, where convolutions would take TF32 by default."""
    if precision == "fp32" and device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # made at run time
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@torch.no_grad()
def backbone_for_inference(model: ResNet, precision: Precision, device: torch.device) -> ResNet:
    """Copy all but the head into the form that computes features fast: BatchNorm folded, channels last.

    Folding is exact up to rounding (Jacob et al., arXiv 1712.05877, section 3.2).

    Returns:
        Maps (N, 3, H, W) in `precision` to (N, NUM_FEATURES).
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    folded.fc = nn.Identity()
    _fold_pair(folded, "conv1", "bn1")
    for block in (module for module in folded.modules() if isinstance(module, Bottleneck)):
        for i in (1, 2, 3):
            _fold_pair(block, f"conv{i}", f"bn{i}")
        if block.downsample is not None:
            _fold_pair(block.downsample, "0", "1")
    return cast(ResNet, folded.to(device=device, dtype=DTYPES[precision], memory_format=torch.channels_last))


def _fold_pair(owner: nn.Module, conv: str, norm: str) -> None:
    folded = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
    setattr(owner, conv, folded)
    setattr(owner, norm, nn.Identity())
