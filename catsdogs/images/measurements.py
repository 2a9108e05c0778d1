"""Measure an image: a perceptual hash, and what makes an image odd.

The measures of brightness and information are those of cleanvision 0.3.6 (`image_property.py`), whose thresholds
`auditing/issues.py` has. Percentiles are of at most MAX_SAMPLES pixels, evenly spaced. Sharpness is the standard
deviation of the Laplacian (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy"), here at 256
pixels, so that it does not depend on the resolution.

Shapes: H, W, C channels, B bins.
"""

import math
from typing import NamedTuple

import imagehash
import numpy as np
import numpy.typing as npt
import scipy.fftpack  # noqa: F401 - ImageHash imports it inside a function; the process that hashes opens no files
from PIL import Image

from catsdogs.images.preprocess import ImageArray

MAX_SAMPLES = 1 << 14
MAX_MEASURED_PIXELS = 1 << 25  # of a larger image, every second pixel, or fewer: copies of all would take gigabytes
LEVELS = 256
MAX_SQUARE = (1 << 12) - 1  # of a perceived brightness, in steps
# Weights of the squares of red, green and blue in the perceived brightness (alienryderflex.com/hsp.html).
WEIGHTS_C = np.array([0.241, 0.691, 0.068])
SQUARES_CB = np.rint(np.outer(WEIGHTS_C, (np.arange(LEVELS) / 255) ** 2) * MAX_SQUARE).astype(np.uint16)
SHARPNESS_SIDE = 256  # pixels of the longer side; a smaller image keeps its size
# Standard deviation of the gray levels, out of 255, of the 32 x 32 pixels that are hashed. Of less, the bits are noise:
# all images of one colour would be equal.
MIN_HASHED_CONTRAST = 2.0
HASHED_SIDE = 32
HASH_BITS = 64


class Measurements(NamedTuple):
    """What is measured of an image.

    Attributes:
        phash: the 64 bits of `imagehash.phash`, the first one the highest; None without contrast.
        brightness: perceived brightness of the mean color, in [0, 1].
        brightness_p5, brightness_p99: percentiles of the perceived brightness of the pixels.
        contrast: standard deviation of the gray levels, in [0, 0.5].
        sharpness: standard deviation of the Laplacian of the gray levels; a blurred image has little.
        entropy: of the levels of all channels, in bits, at most log2(768).
    """

    phash: int | None
    brightness: float
    brightness_p5: float
    brightness_p99: float
    contrast: float
    sharpness: float
    entropy: float


def measure_image(image_HWC: ImageArray) -> Measurements:
    """Measure decoded pixels, uint8 (H, W, 3), RGB, upright."""
    image_HWC = _take_every_nth(image_HWC, MAX_MEASURED_PIXELS)
    image = Image.fromarray(image_HWC)
    gray = image.convert("L")
    counts_CB = np.array(image.histogram()).reshape(3, LEVELS)
    p5, p99 = _measure_brightness(image_HWC)
    return Measurements(
        phash=hash_image(gray),
        brightness=_measure_mean_brightness(counts_CB),
        brightness_p5=p5,
        brightness_p99=p99,
        contrast=_measure_spread(gray) / 255,
        sharpness=_measure_sharpness(gray),
        entropy=_measure_entropy(counts_CB),
    )


def _take_every_nth(image_HWC: ImageArray, max_pixels: int) -> ImageArray:
    """Take pixels at even distances from an image that has more than `max_pixels`."""
    num_pixels = image_HWC.shape[0] * image_HWC.shape[1]
    step = max(1, math.ceil(math.sqrt(num_pixels / max_pixels)))
    return image_HWC[::step, ::step]


def hash_image(gray: Image.Image) -> int | None:
    """Compute the perceptual hash of a gray image; None if it has too little contrast."""
    hashed = gray.resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.LANCZOS)
    if _measure_spread(hashed) < MIN_HASHED_CONTRAST:
        return None
    bits = imagehash.phash(hashed).hash  # resizing to its own size leaves an image as it is
    return int.from_bytes(np.packbits(bits).tobytes())


def _measure_spread(gray: Image.Image) -> float:
    """Return the standard deviation of the gray levels."""
    share_B = np.array(gray.histogram()) / (gray.width * gray.height)
    levels_B = np.arange(LEVELS)
    return float(np.sqrt(share_B @ (levels_B - share_B @ levels_B) ** 2))


def _measure_entropy(counts_CB: npt.NDArray[np.int64]) -> float:
    share_CB = counts_CB[counts_CB > 0] / counts_CB.sum()
    return float(-(share_CB * np.log2(share_CB)).sum())


def _measure_mean_brightness(counts_CB: npt.NDArray[np.int64]) -> float:
    mean_C = counts_CB @ np.arange(LEVELS) / counts_CB.sum(axis=1)
    return float(np.sqrt(WEIGHTS_C @ mean_C**2) / 255)


def _measure_brightness(image_HWC: ImageArray) -> tuple[float, float]:
    """Return the 5th and the 99th percentile of the perceived brightness."""
    sampled_HWC = _take_every_nth(image_HWC, MAX_SAMPLES)
    square_HW = SQUARES_CB[0][sampled_HWC[..., 0]]
    square_HW += SQUARES_CB[1][sampled_HWC[..., 1]]
    square_HW += SQUARES_CB[2][sampled_HWC[..., 2]]
    num_below_B = np.cumsum(np.bincount(square_HW.ravel(), minlength=MAX_SQUARE + 1))
    squares = np.searchsorted(num_below_B, np.array([0.05, 0.99]) * square_HW.size)
    p5, p99 = np.sqrt(np.minimum(squares / MAX_SQUARE, 1.0)).tolist()
    return p5, p99


def _measure_sharpness(gray: Image.Image) -> float:
    ratio = max(gray.size) / SHARPNESS_SIDE
    if ratio > 1:
        size = (max(int(gray.width // ratio), 1), max(int(gray.height // ratio), 1))
        gray = gray.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    levels_HW = np.asarray(gray).astype(np.int16)
    laplacian_HW = np.zeros_like(levels_HW)
    for near_HW, far_HW, out_HW in (
        (levels_HW[:-1], levels_HW[1:], laplacian_HW[:-1]),
        (levels_HW[1:], levels_HW[:-1], laplacian_HW[1:]),
        (levels_HW[:, :-1], levels_HW[:, 1:], laplacian_HW[:, :-1]),
        (levels_HW[:, 1:], levels_HW[:, :-1], laplacian_HW[:, 1:]),
    ):
        out_HW += near_HW - far_HW  # at the border, a missing neighbour is as bright as the pixel
    return float(laplacian_HW.std(dtype=np.float32))
