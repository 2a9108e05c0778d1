"""Random views of training images; the generator that is passed in is the only source of randomness.

`draw_view` draws what `augment` computes on a CPU for one image, and `augment_tensors` on a device for a batch.

N batch, C channels, H height, W width, S side of the output.
"""

from collections.abc import Sequence
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import affine_grid, grid_sample

from catsdogs.errors import InputError
from catsdogs.images.preprocess import ImageArray
from catsdogs.images.tensors import Resize, resize_tensors, resize_to_square, to_device, to_image

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


class View(NamedTuple):
    """A random view of an image: a box of it is resized to a square, then sampled through a matrix, then flipped.

    Attributes:
        box: top, left, height and width.
        matrix_XY: float32 (2, 3), as `torch.nn.functional.affine_grid` takes it; None keeps the square.
    """

    box: tuple[int, int, int, int]
    matrix_XY: npt.NDArray[np.float32] | None
    flipped: bool


def draw_view(height: int, width: int, augmentation: str, rng: np.random.Generator) -> View:
    """Draw one random view of an image of this size.

    Args:
        augmentation: `light` is a random resized crop and flip; `affine` is a rotation, shift, shear, zoom and flip of
            the whole image, with repeated edges.
    """
    if augmentation == "light":
        box, matrix_XY = _draw_box(height, width, rng), None
    elif augmentation == "affine":
        box, matrix_XY = (0, 0, height, width), _draw_matrix(rng)
    else:
        raise InputError(f"augment must be light or affine, not {augmentation}")
    return View(box, matrix_XY, bool(rng.random() < 0.5))


def augment(image: ImageArray, augmentation: str, img_size: int, rng: np.random.Generator) -> ImageArray:
    """Make one random view of an image.

    Args:
        image: uint8 (H, W, 3), any size, may be read-only.
        augmentation: as in `draw_view`.
        img_size: S.

    Returns:
        uint8 (S, S, 3), contiguous and writable.
    """
    (top, left, height, width), matrix_XY, flipped = draw_view(image.shape[0], image.shape[1], augmentation, rng)
    view_CSS = resize_to_square(image[top : top + height, left : left + width], img_size)
    if matrix_XY is not None:
        view_CSS = _sample(view_CSS[None], torch.from_numpy(matrix_XY)[None])[0]
    return to_image(view_CSS.flip(2) if flipped else view_CSS)


def augment_tensors(images: Sequence[torch.Tensor], views: Sequence[View], img_size: int) -> torch.Tensor:
    """Make one view of each image, uint8 (H, W, 3), on their device: uint8 (N, S, S, 3).

    Up to one level of 255 per pixel from `augment`, which rounds after each direction.
    """
    resizes = []
    for image_HWC, ((top, left, height, width), matrix_XY, flipped) in zip(images, views, strict=True):
        box_CHW = image_HWC[top : top + height, left : left + width].permute(2, 0, 1)
        resizes.append(Resize(box_CHW, (img_size, img_size), flipped=flipped and matrix_XY is None))
    squares_NHWC = resize_tensors(resizes, img_size)
    matrices = [view.matrix_XY for view in views if view.matrix_XY is not None]
    if not matrices:
        return squares_NHWC
    sampled_NCHW = _sample(squares_NHWC.permute(0, 3, 1, 2), to_device(np.stack(matrices), images[0].device))
    flipped_N = to_device(np.array([view.flipped for view in views]), images[0].device)
    return torch.where(flipped_N[:, None, None, None], sampled_NCHW.flip(3), sampled_NCHW).permute(0, 2, 3, 1)


def _draw_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    crop_height, crop_width = _draw_crop(height, width, rng)
    top = int(rng.integers(height - crop_height + 1))
    left = int(rng.integers(width - crop_width + 1))
    return top, left, crop_height, crop_width


def _draw_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw height and width of a crop by area and log ratio; for a strip, take the largest that keeps the ratio."""
    for _ in range(_MAX_TRIES):
        area = height * width * rng.uniform(*_SCALE)
        ratio = exp(rng.uniform(log(_RATIO[0]), log(_RATIO[1])))
        crop_width, crop_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return crop_height, crop_width
    return min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))


def _draw_matrix(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw Keras's matrix, rotation x shift x shear x zoom about the centre."""
    angle = np.deg2rad(rng.uniform(-_ROTATION, _ROTATION))
    rotation_YX = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = rng.uniform(-_SHEAR, _SHEAR)
    shift_Y = rng.uniform(-_SHIFT, _SHIFT, 2) * 2  # sampling coordinates run from -1 to 1
    zoom_Y = rng.uniform(1 - _ZOOM, 1 + _ZOOM, 2)
    shear_YX = np.array([[1, -np.sin(shear)], [0, np.cos(shear)]])
    matrix_YX = np.column_stack([rotation_YX @ shear_YX @ np.diag(zoom_Y), rotation_YX @ shift_Y])
    return matrix_YX[::-1, [1, 0, 2]].astype(np.float32)  # torch counts columns first


def _sample(images_NCSS: torch.Tensor, matrices_NXY: torch.Tensor) -> torch.Tensor:
    """Sample each image through its matrix; repeat the edges."""
    grid = affine_grid(matrices_NXY, list(images_NCSS.shape), align_corners=False)
    views = grid_sample(images_NCSS.float(), grid, padding_mode="border", align_corners=False)
    return views.round_().to(torch.uint8)
