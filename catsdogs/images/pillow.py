"""Decode files with Pillow to uint8 RGB: orientation, bit depth, palette and alpha included.

Each format's reader is called directly, not through `Image.open`, which could run others, such as Ghostscript for EPS.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from catsdogs.images.preprocess import ImageArray

_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
logger = logging.getLogger(__name__)


class PillowError(Exception):
    """Pillow cannot read the bytes of a file."""


def configure_pillow() -> None:
    """Configure Pillow in a process that only decodes: no size limit beside `max_pixels`, one core, no warnings.

    Other processes keep Pillow's settings and Python's warning filters. The warnings are about metadata.
    """
    Image.MAX_IMAGE_PIXELS = None
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(file_format: str, image_bytes: bytes) -> ImageFile.ImageFile:
    """Read the header only.

    Raises:
        PillowError: Pillow does not understand it.
    """
    reader, file = _READERS[file_format], io.BytesIO(image_bytes)
    with _pillow_errors():
        return reader(file)


def read_stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return width and height as in the file: Pillow swaps those of a rotated TIFF."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def read_rgb(image: ImageFile.ImageFile) -> ImageArray:
    """Decode the first frame to uint8 (H, W, 3): upright, 8 bits, alpha over white.

    Raises:
        PillowError: Pillow cannot decode the pixels.
    """
    with _pillow_errors():
        image.load()
    upright = _to_upright(image)
    if image.mode.startswith(("I", "F")):
        return np.repeat(_scale_to_8_bits(np.asarray(upright), image)[:, :, np.newaxis], 3, axis=2)
    with _pillow_errors():
        if not upright.has_transparency_data:
            return np.array(upright.convert("RGB"))
        rgba = _to_rgba(upright)
    return rgba_to_rgb(rgba)


def rgba_to_rgb(rgba: ImageArray | Image.Image) -> ImageArray:
    """Composite an RGBA image, an array (H, W, 4) or Pillow's, over white."""
    image = Image.fromarray(rgba) if isinstance(rgba, np.ndarray) else rgba
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.array(white.convert("RGB"))


@contextlib.contextmanager
def _pillow_errors() -> Iterator[None]:
    """Convert what Pillow raises, which may be any exception, to PillowError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        logger.debug("Pillow refused an image", exc_info=True)
        message = str(error)
        raise PillowError(message if " " in message else f"{type(error).__name__} {message}".strip()) from error


def _to_upright(image: ImageFile.ImageFile) -> Image.Image:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image  # its load() has rotated it
    try:
        method = _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        logger.debug("Pillow cannot read EXIF data", exc_info=True)
        return image
    return image if method is None else image.transpose(method)


def _to_rgba(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        # A 16-bit PNG: Pillow keeps the high byte of each pixel, but all of the transparent color.
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA")


def _scale_to_8_bits(values_HW: npt.NDArray[np.generic], source: ImageFile.ImageFile) -> ImageArray:
    """Scale one channel of more than 8 bits, which Pillow's `convert` would clip."""
    scaled_HW = np.nan_to_num(values_HW.astype(np.float32) * np.float32(255 / _find_white(values_HW, source)))
    gray_HW: ImageArray = np.rint(scaled_HW.clip(0, 255)).astype(np.uint8)
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        if source.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
            gray_HW = 255 - gray_HW
    elif (transparency := source.info.get("transparency")) is not None:
        gray_HW[values_HW == transparency] = 255
    return gray_HW


def _find_white(values_HW: npt.NDArray[np.generic], source: ImageFile.ImageFile) -> float:
    """Return the value of white.

    In 16-bit files, and 12-bit TIFF files, it follows from the bit depth. Float and 32-bit files do not define it: it
    is the first of 1 (float only), 255 and 65535 that no pixel exceeds, else the largest value.
    """
    if source.mode.startswith("I;16"):
        tags = getattr(source, "tag_v2", {})
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return float(2**bits - 1)
    largest = float(np.nan_to_num(values_HW, posinf=0).max())
    usual = (1.0, 255.0, 65535.0) if source.mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if largest <= white), largest)
