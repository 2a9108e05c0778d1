"""What the peers share, so that they differ in what is compared alone: files, weights, labels, the clock."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchvision.models import ResNet, resnet50
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLD = 50  # decoded images at a time
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH_SIZE = 256 if DEVICE.type == "cuda" else 32
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
    return model.eval().to(DEVICE)


def num_loaders(tuned: bool) -> int:
    """Choose how many processes load images: all cores beside a GPU, one of two beside a model that takes both."""
    return os.cpu_count() or 1 if DEVICE.type == "cuda" else 1 if tuned else 2


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


def decode_all(decode: Callable[[bytes], object]) -> None:
    """Decode files that are in memory, on one core."""
    torch.set_num_threads(1)
    files = [Path(path).read_bytes() for path in paths_of(arguments().images)]
    for start in range(0, len(files), TOLD):
        for content in files[start : start + TOLD]:
            decode(content)
        tell(len(files[start : start + TOLD]))


def suited(images_NCHW: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Bring images to a model, `optimized` or not, in the type and the layout that it computes in."""
    dtype = next(model.parameters()).dtype
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    return images_NCHW.to(DEVICE, non_blocking=True).to(dtype, memory_format=layout)


def optimized(model: ResNet) -> torch.nn.Module:
    """Put a model into the form that an expert would: channels last, bf16."""
    return model.to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]
