"""Pillow with the weights' own transforms, on one core; they resize the PIL image, as torchvision's tutorials do."""

import io
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

from benchmarks.speed.peers.common import arguments, paths_of, tell

TOLD = 50  # images


def main() -> None:
    """Decode files that are in memory."""
    torch.set_num_threads(1)
    files = [Path(path).read_bytes() for path in paths_of(arguments().images)]
    transforms = ResNet50_Weights.IMAGENET1K_V2.transforms()
    for start in range(0, len(files), TOLD):
        for content in files[start : start + TOLD]:
            transforms(Image.open(io.BytesIO(content)).convert("RGB"))
        tell(len(files[start : start + TOLD]))


if __name__ == "__main__":
    main()
