"""Random views of a training image; every number is drawn from the generator that is passed in.

C channels, H, W; S the size of the output.
"""

from math import exp, log, sqrt

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from catsdogs.errors import InputError
from catsdogs.images.preprocess import ImageArray
from catsdogs.images.tensors import to_pixels, to_tensor
from catsdogs.vision import InterpolationMode, functional

# A quarter of the area at least, where training from scratch on ImageNet takes 0.08 (Szegedy et al. 2015,
# "Going deeper with convolutions", section 6): with few images and few epochs, a crop that misses the animal
# is a wrong label that nothing averages out, and pretrained features need less of it.
_SCALE = (0.25, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10  # as torchvision's RandomResizedCrop

# Of the notebook's ImageDataGenerator.
_ROTATION = 40.0  # degrees
_SHIFT = 0.2  # of the side
_SHEAR = 0.2  # radians, as Keras read it then; later releases read degrees, which is no shear to speak of
_ZOOM = 0.2


def augment(image: ImageArray, kind: str, img_size: int, rng: np.random.Generator) -> ImageArray:
    """Draw one random view of an image.

    Args:
        image: uint8 (H, W, 3), any size, may be read-only.
        kind: `light`, random resized crop and flip; `affine`, the notebook's rotation, shift, shear, zoom
            and flip of the whole image, edges repeated.
        img_size: side of the output, S.
        rng: the only source of randomness: the same state draws the same pixels.

    Returns:
        uint8 (S, S, 3), contiguous and writable.
    """
    if kind == "light":
        view_CSS = _random_resized_crop(image, img_size, rng)
    elif kind == "affine":
        view_CSS = _random_affine(_resize(to_tensor(image), img_size), rng)
    else:
        raise InputError(f"augment must be light or affine, not {kind}")
    return to_pixels(view_CSS.flip(2) if rng.random() < 0.5 else view_CSS)


def _resize(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    resized: torch.Tensor = functional.resize(image_CHW, [size, size], InterpolationMode.BILINEAR, antialias=True)
    return resized


def _random_resized_crop(image: ImageArray, size: int, rng: np.random.Generator) -> torch.Tensor:
    height, width = image.shape[:2]
    crop_height, crop_width = _draw_crop(height, width, rng)
    top = int(rng.integers(height - crop_height + 1))
    left = int(rng.integers(width - crop_width + 1))
    return _resize(to_tensor(image[top : top + crop_height, left : left + crop_width]), size)


def _draw_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a crop's height and width by area and log ratio; for a strip, the largest that keeps the ratio."""
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*_SCALE)
        ratio = exp(rng.uniform(log(_RATIO[0]), log(_RATIO[1])))
        crop_width, crop_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return crop_height, crop_width
    return min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))


def _random_affine(image_CSS: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Sample through Keras's matrix, rotation x shift x shear x zoom about the centre, edges repeated."""
    rotation_YX, shear = (
        _rotation(np.deg2rad(rng.uniform(-_ROTATION, _ROTATION))),
        rng.uniform(-_SHEAR, _SHEAR),
    )
    shift_Y = rng.uniform(-_SHIFT, _SHIFT, 2) * 2  # sampling coordinates run from -1 to 1
    zoom_Y = rng.uniform(1 - _ZOOM, 1 + _ZOOM, 2)
    shear_YX = np.array([[1, -np.sin(shear)], [0, np.cos(shear)]])
    matrix_YX = np.column_stack([rotation_YX @ shear_YX @ np.diag(zoom_Y), rotation_YX @ shift_Y])
    matrix_XY = matrix_YX[::-1, [1, 0, 2]]  # torch counts columns first
    theta = torch.from_numpy(matrix_XY.astype(np.float32))[None]
    grid = affine_grid(theta, [1, *image_CSS.shape], align_corners=False)
    view = grid_sample(image_CSS[None].float(), grid, padding_mode="border", align_corners=False)
    return view[0].round_().to(torch.uint8)


def _rotation(angle: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
