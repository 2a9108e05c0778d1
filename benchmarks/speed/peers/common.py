"""What the peers share, so that they differ in what is compared alone: files, weights, labels, the clock."""

import argparse
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchvision.models import ResNet, resnet50
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOG = "CATSDOGS_BENCH_LOG"  # names the file of `tell`


def arguments() -> argparse.Namespace:
    """Parse what every peer is given."""
    parser = argparse.ArgumentParser()
    for name in ("--images", "--checkpoint", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tuned", action="store_true")
    return parser.parse_args()


def load_model(checkpoint: str) -> ResNet:
    """Load ResNet50 as torchvision makes it, in fp32 and NCHW."""
    weights = load_file(os.path.join(checkpoint, "model.safetensors"))
    model = resnet50(num_classes=len(weights["fc.bias"]))
    model.load_state_dict(weights)
    return model.eval()


def transforms() -> Compose:
    """Make the weights' own preprocessing, on a PIL image."""
    return Compose([Resize(232), CenterCrop(224), ToTensor(), Normalize(MEAN, STD)])


def paths_of(folder: str) -> list[str]:
    """Name the images, sorted."""
    return sorted(str(path) for path in Path(folder).rglob("*.jpg"))


def tell(num_images: int) -> None:
    """Note that so many more images are labelled."""
    with open(os.environ[LOG], "a", encoding="ascii") as file:
        file.write(f"{time.time()} {num_images}\n")


def optimized(model: ResNet) -> torch.nn.Module:
    """Put a model into the form that an expert would: channels last, bf16."""
    return model.to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]
