"""Resize and centre-crop an image of any size to the model's input size."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import floor, isfinite

import numpy as np
import numpy.typing as npt

from catsdogs.config import MAX_IMG_SIZE, MIN_IMG_SIZE
from catsdogs.errors import InputError

ImageArray = npt.NDArray[np.uint8]

# ImageNet's training images, as in every ResNet50_Weights of torchvision.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MIN_CROP_PCT = 0.5  # timm's pretrained models have 0.7 to 1
# 255 and 1 / 255 are those of programs that do not divide pixels by 255.
MAX_MEAN, MIN_STD, MAX_STD = 255.0, 1e-3, 255.0
MAX_ASPECT_RATIO = 32  # long side / short side; of a longer strip only the middle is resized


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How evaluation and scoring turn pixels into the model's input; stored in checkpoints."""

    img_size: int = 224
    crop_pct: float = 0.965
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _to_triple("mean", self.mean))
        object.__setattr__(self, "std", _to_triple("std", self.std))
        if not MIN_IMG_SIZE <= self.img_size <= MAX_IMG_SIZE:
            raise InputError(f"img_size must be from {MIN_IMG_SIZE} to {MAX_IMG_SIZE}, not {self.img_size}")
        if not MIN_CROP_PCT <= self.crop_pct <= 1:
            raise InputError(f"crop_pct must be from {MIN_CROP_PCT} to 1, not {self.crop_pct}")
        if max(map(abs, self.mean)) > MAX_MEAN:
            raise InputError(f"mean must be from -{MAX_MEAN:g} to {MAX_MEAN:g}, not {self.mean}")
        if not MIN_STD <= min(self.std) <= max(self.std) <= MAX_STD:
            raise InputError(f"std must be from {MIN_STD:g} to {MAX_STD:g}, not {self.std}")
        if self.interpolation != "bilinear":
            raise InputError(f"interpolation must be bilinear, not {self.interpolation}")

    @cached_property
    def resize_size(self) -> int:
        """The short side before the crop: floor(img_size / crop_pct), exact in decimals."""
        return floor(self.img_size / Fraction(str(self.crop_pct)))

    def __call__(self, image: ImageArray) -> ImageArray:
        """Resize the short side and crop the centre as torchvision's v2 Resize and CenterCrop do.

        Args:
            image: uint8 (H, W, 3), any size, may be read-only.

        Returns:
            uint8 (img_size, img_size, 3), contiguous and writable.
        """
        from catsdogs.images.tensors import resize_and_crop  # not at the top: the driver needs no torch

        return resize_and_crop(_crop_strip(image), self.resize_size, self.img_size)


def _crop_strip(image: ImageArray) -> ImageArray:
    """Cut both ends off a strip, which leaves the centre crop as it is.

    Resizing all of 1 x 5000 to a short side of 232 would take 800 MB.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    excess = max(height, width) - MAX_ASPECT_RATIO * short
    if excess <= 0:
        return image
    cut = excess // 2
    return image[cut : height - cut] if height > width else image[:, cut : width - cut]


def _to_triple(name: str, values: object) -> tuple[float, float, float]:
    """Check three numbers; JSON turns a tuple into a list."""
    if not isinstance(values, (tuple, list)) or len(values) != 3 or not all(map(isfinite, values)):
        raise InputError(f"{name} must be three numbers, not {values!r}")
    red, green, blue = (float(value) for value in values)
    return red, green, blue
