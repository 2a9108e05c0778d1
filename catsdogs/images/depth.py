"""Scale samples of more than 8 bits to 8 bits, where Pillow's `convert` would clip them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from catsdogs.images.preprocess import ImageArray

Samples = npt.NDArray[Any]  # integers or floats of any size


def scale_to_8_bits(values: Samples, white: float) -> ImageArray:
    """Scale values of any shape so that 0 becomes 0 and `white` 255; NaN becomes 0."""
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, which becomes 255
        scaled = np.nan_to_num(values.astype(np.float32) * np.float32(255 / white))
    image: ImageArray = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return image


def find_white(values: Samples) -> float:
    """Return the value of white.

    In 16-bit unsigned files it follows from the bit depth. The other files do not define it: it is the first of 1
    (float only), 255 and 65535 that no pixel exceeds, else the largest value. If the highest bit of unsigned integers
    is used, it is the largest value of the type.
    """
    if values.dtype == np.uint16:
        return 65535.0
    is_float = values.dtype.kind == "f"
    largest = float((np.nan_to_num(values, posinf=0) if is_float else values).max())
    if values.dtype.kind == "u" and largest >= 1 << (8 * values.itemsize - 1) > 65535:
        return 2.0 ** (8 * values.itemsize) - 1
    usual = (1.0, 255.0, 65535.0) if is_float else (255.0, 65535.0)
    return next((white for white in usual if largest <= white), largest)
