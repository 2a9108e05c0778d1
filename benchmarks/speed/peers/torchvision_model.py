"""ResNet50 and its preprocessing as torchvision provides them, the same for every peer."""

import os

import torch
from safetensors.torch import load_file
from torchvision.models import ResNet, resnet50
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from benchmarks.speed.protocol import DEVICE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_model(checkpoint: str) -> ResNet:
    """Load a checkpoint into torchvision's ResNet50, fp32 and NCHW."""
    weights = load_file(os.path.join(checkpoint, "model.safetensors"))
    model = resnet50(num_classes=len(weights["fc.bias"]))
    model.load_state_dict(weights)
    return model.eval().to(DEVICE)


def optimize(model: torch.nn.Module) -> torch.nn.Module:
    """Convert a model to what an expert would run: bf16, channels last."""
    return model.to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def to_model_input(images_NCHW: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Move images to the device, in the dtype and memory format of a model, optimized or not."""
    dtype = next(model.parameters()).dtype
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    return images_NCHW.to(DEVICE, non_blocking=True).to(dtype, memory_format=layout)


def build_transforms() -> Compose:
    """Build the preprocessing of the weights, on a PIL image."""
    return Compose([Resize(232), CenterCrop(224), ToTensor(), Normalize(MEAN, STD)])


def choose_num_workers(tuned: bool) -> int:
    """Choose how many processes load images: all cores beside a GPU, one of two beside a model that uses both."""
    if DEVICE.type == "cuda":
        return os.cpu_count() or 1
    return 1 if tuned else 2
