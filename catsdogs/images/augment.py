"""Random views of a training image; the generator that is passed in is the only source of randomness.

C channels, H height, W width, S side of the output.
"""

from math import exp, log, sqrt

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from catsdogs.errors import InputError
from catsdogs.images.preprocess import ImageArray
from catsdogs.images.tensors import resize_to_square, to_image

# Fraction of the area. Training from scratch on ImageNet crops from 0.08 (Szegedy et al. 2015, arXiv 1409.4842, section
# 6); fine-tuning has too few epochs to average out crops that miss the animal.
_SCALE = (0.25, 1.0)
_RATIO = (3 / 4, 4 / 3)
_MAX_TRIES = 10  # as torchvision's RandomResizedCrop

# The values of the notebook's ImageDataGenerator (docs/benchmarks.md).
_ROTATION = 40.0  # degrees
_SHIFT = 0.2  # of the side
_SHEAR = 0.2  # radians, as in Keras then; later releases use degrees, in which 0.2 is almost no shear
_ZOOM = 0.2


def augment(image: ImageArray, augmentation: str, img_size: int, rng: np.random.Generator) -> ImageArray:
    """Draw one random view of an image.

    Args:
        image: uint8 (H, W, 3), any size, may be read-only.
        augmentation: `light` is a random resized crop and flip; `affine` is a rotation, shift, shear, zoom and flip of
            the whole image, with repeated edges.
        img_size: S.

    Returns:
        uint8 (S, S, 3), contiguous and writable.
    """
    if augmentation == "light":
        view_CSS = _random_resized_crop(image, img_size, rng)
    elif augmentation == "affine":
        view_CSS = _random_affine(resize_to_square(image, img_size), rng)
    else:
        raise InputError(f"augment must be light or affine, not {augmentation}")
    return to_image(view_CSS.flip(2) if rng.random() < 0.5 else view_CSS)


def _random_resized_crop(image: ImageArray, size: int, rng: np.random.Generator) -> torch.Tensor:
    height, width = image.shape[:2]
    crop_height, crop_width = _draw_crop(height, width, rng)
    top = int(rng.integers(height - crop_height + 1))
    left = int(rng.integers(width - crop_width + 1))
    return resize_to_square(image[top : top + crop_height, left : left + crop_width], size)


def _draw_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw height and width of a crop by area and log ratio; for a strip, take the largest that keeps the ratio."""
    for _ in range(_MAX_TRIES):
        area = height * width * rng.uniform(*_SCALE)
        ratio = exp(rng.uniform(log(_RATIO[0]), log(_RATIO[1])))
        crop_width, crop_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return crop_height, crop_width
    return min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))


def _random_affine(image_CSS: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Sample through Keras's matrix, rotation x shift x shear x zoom about the centre; repeat the edges."""
    angle = np.deg2rad(rng.uniform(-_ROTATION, _ROTATION))
    rotation_YX = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = rng.uniform(-_SHEAR, _SHEAR)
    shift_Y = rng.uniform(-_SHIFT, _SHIFT, 2) * 2  # sampling coordinates run from -1 to 1
    zoom_Y = rng.uniform(1 - _ZOOM, 1 + _ZOOM, 2)
    shear_YX = np.array([[1, -np.sin(shear)], [0, np.cos(shear)]])
    matrix_YX = np.column_stack([rotation_YX @ shear_YX @ np.diag(zoom_Y), rotation_YX @ shift_Y])
    matrix_XY = matrix_YX[::-1, [1, 0, 2]]  # torch counts columns first
    theta = torch.from_numpy(matrix_XY.astype(np.float32))[None]
    grid = affine_grid(theta, [1, *image_CSS.shape], align_corners=False)
    view = grid_sample(image_CSS[None].float(), grid, padding_mode="border", align_corners=False)
    return view[0].round_().to(torch.uint8)
