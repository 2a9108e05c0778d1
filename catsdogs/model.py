"""ResNet50 with our head, what of it trains, the form it takes for inference.

Shapes: N batch, C channels, H, W, K classes.
"""

import copy
from typing import Literal, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from catsdogs.vision import Bottleneck, ResNet, resnet50

HEAD = "fc"


def build(num_classes: int, seed: int) -> ResNet:
    """Make a randomly initialised ResNet50; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(ResNet, resnet50(weights=None, num_classes=num_classes))


def freeze_backbone(model: ResNet) -> None:
    """Leave the head alone to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(f"{HEAD}.")


def is_frozen(model: nn.Module) -> bool:
    """Whether the backbone's parameters stay as they are."""
    return not next(model.parameters()).requires_grad


def training_mode(model: ResNet, num_rows: int) -> None:
    """Switch to training; BatchNorm's statistics stay still where the backbone is frozen.

    They also stay still for a batch of fewer than two rows, which has no variance to learn from.
    """
    model.train(not is_frozen(model) and num_rows >= 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group what trains: weight matrices decay, norms and biases (one dimension) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def resolve_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """Choose bf16 where it is faster than fp32: on AVX512-BF16 and AMX CPUs, on Ampere and later GPUs."""
    if precision != "auto":
        return cast(Literal["fp32", "bf16"], precision)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.backends.cpu.get_cpu_capability(), _cpu_flags()
        fast = "AVX512" in capabilities[0] and "avx512_bf16" in capabilities[1]
    return "bf16" if fast else "fp32"


def compute_exactly(precision: str, device: torch.device) -> None:
    """Keep fp32 what it says on a GPU, where convolutions would take TF32 by default."""
    if precision == "fp32" and device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # made at run time
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


@torch.no_grad()
def for_inference(model: ResNet, precision: Literal["fp32", "bf16"], device: torch.device) -> nn.Module:
    """Copy a model into the form that labels fastest: BatchNorm folded, channels last, in `precision`.

    Folding is exact up to rounding (Jacob et al., arXiv 1712.05877, section 3.2).
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_pair(folded, "conv1", "bn1")
    for block in (module for module in folded.modules() if isinstance(module, Bottleneck)):
        for i in (1, 2, 3):
            _fold_pair(block, f"conv{i}", f"bn{i}")
        if block.downsample is not None:
            _fold_pair(block.downsample, "0", "1")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return cast(nn.Module, folded.to(device=device, dtype=dtype, memory_format=torch.channels_last))


def _fold_pair(owner: nn.Module, conv: str, norm: str) -> None:
    folded = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
    setattr(owner, conv, folded)
    setattr(owner, norm, nn.Identity())
