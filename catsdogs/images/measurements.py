"""Measure an image: a perceptual hash, and what makes an image odd.

The measures of brightness, information and blur are those of cleanvision 0.3.6 (`image_property.py`), whose thresholds
`auditing/issues.py` has. Percentiles are of at most MAX_SAMPLES pixels, evenly spaced.

Shapes: H, W, C channels, B bins.
"""

import math
from typing import NamedTuple

import imagehash
import numpy as np
import numpy.typing as npt
import scipy.fftpack  # noqa: F401 - ImageHash imports it inside a function; the process that hashes opens no files
from PIL import Image, ImageFilter, ImageStat

from catsdogs.images.preprocess import ImageArray

MAX_SAMPLES = 1 << 16
LEVELS = 256
MAX_SQUARE = (1 << 12) - 1  # of a perceived brightness, in steps
# Weights of the squares of red, green and blue in the perceived brightness (alienryderflex.com/hsp.html).
WEIGHTS_C = np.array([0.241, 0.691, 0.068])
SQUARES_CB = np.rint(np.outer(WEIGHTS_C, (np.arange(LEVELS) / 255) ** 2) * MAX_SQUARE).astype(np.uint16)
SHARPNESS_SIDE = 64  # pixels of the longer side, at which edges are measured
SHARPNESS_FACTOR, MIN_SPREAD = 0.01, 0.18
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
        sharpness: in [0, 1]; a blurred image has little.
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
        entropy=image.entropy(),
    )


def hash_image(gray: Image.Image) -> int | None:
    """Compute the perceptual hash of a gray image; None if it has too little contrast."""
    hashed = gray.resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.LANCZOS)
    if _measure_spread(hashed) < MIN_HASHED_CONTRAST:
        return None
    bits = imagehash.phash(hashed).hash  # resizing to its own size leaves an image as it is
    return int.from_bytes(np.packbits(bits).tobytes())


def _measure_spread(gray: Image.Image) -> float:
    return float(ImageStat.Stat(gray).stddev[0])


def _measure_mean_brightness(counts_CB: npt.NDArray[np.int64]) -> float:
    mean_C = counts_CB @ np.arange(LEVELS) / counts_CB.sum(axis=1)
    return float(np.sqrt(WEIGHTS_C @ mean_C**2) / 255)


def _measure_brightness(image_HWC: ImageArray) -> tuple[float, float]:
    """Return the 5th and the 99th percentile of the perceived brightness."""
    step = max(1, math.isqrt(image_HWC.shape[0] * image_HWC.shape[1] // MAX_SAMPLES))
    sampled_HWC = image_HWC[::step, ::step]
    square_HW = SQUARES_CB[0][sampled_HWC[..., 0]]
    square_HW += SQUARES_CB[1][sampled_HWC[..., 1]]
    square_HW += SQUARES_CB[2][sampled_HWC[..., 2]]
    num_below_B = np.cumsum(np.bincount(square_HW.ravel(), minlength=MAX_SQUARE + 1))
    squares = np.searchsorted(num_below_B, np.array([0.05, 0.99]) * square_HW.size)
    p5, p99 = np.sqrt(np.minimum(squares / MAX_SQUARE, 1.0)).tolist()
    return p5, p99


def _measure_sharpness(gray: Image.Image) -> float:
    """Measure the edges of the image at 64 pixels; an image whose levels are few but far apart is sharp, too."""
    ratio = max(gray.size) / SHARPNESS_SIDE
    if ratio > 1:
        size = (max(int(gray.width // ratio), 1), max(int(gray.height // ratio), 1))
        gray = gray.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    edges = _measure_spread(gray.filter(ImageFilter.FIND_EDGES))
    spread = 1 - math.exp(-SHARPNESS_FACTOR * float(np.std(gray.histogram())))
    return min(1.0, 1 - math.exp(-SHARPNESS_FACTOR * edges) + (spread if spread > MIN_SPREAD else 0.0))
