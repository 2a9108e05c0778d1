"""Pillow with the transforms of the weights, on one core; they resize the PIL image, as in torchvision's tutorials."""

import io

from PIL import Image
from torchvision.models import ResNet50_Weights

from benchmarks.speed.protocol import decode_all


def main() -> None:
    """Decode and transform."""
    transforms = ResNet50_Weights.IMAGENET1K_V2.transforms()
    decode_all(lambda content: transforms(Image.open(io.BytesIO(content)).convert("RGB")))


if __name__ == "__main__":
    main()
