"""Pixels of whatever Pillow reads, as uint8 RGB: orientation, depth, palette and alpha taken care of.

A format's reader is called by name instead of `Image.open`: nothing but the listed formats can be reached
(no Ghostscript), and the only size limit is the caller's.
"""

import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# Some readers ask Pillow's own limit on top of ours; `decode` has judged the size before they get there.
Image.MAX_IMAGE_PIXELS = None

_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def open_image(kind: str, image_bytes: bytes) -> ImageFile.ImageFile:
    """Read the header only. Raises whatever Pillow raises on bytes that it does not understand."""
    _ignore_pillow_warnings()
    return _READERS[kind](io.BytesIO(image_bytes))


def stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return width and height as in the file: Pillow swaps those of a TIFF that lies on its side."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def read_rgb(image: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
    """Decode the first frame to uint8 (H, W, 3): upright, 8 bits, alpha over white."""
    image.load()
    if image.mode.startswith(("I", "F")):
        return _gray_to_rgb(_deep_to_8_bits(_upright(image), image))
    upright = _upright(image)
    if not upright.has_transparency_data:
        return np.array(upright.convert("RGB"))
    white = Image.new("RGBA", upright.size, "white")
    white.alpha_composite(_to_rgba(upright))
    return np.array(white.convert("RGB"))


def is_upright(exif_bytes: bytes) -> bool:
    """Whether EXIF data, which may be none, turn no picture; not so where they cannot be read."""
    _ignore_pillow_warnings()
    exif = Image.Exif()
    try:
        exif.load(exif_bytes)
        return bool(exif.get(_ORIENTATION, 1) == 1)
    except Exception:  # noqa: BLE001 Pillow raises whatever the bytes lead it into
        return False


def _ignore_pillow_warnings() -> None:
    """Keep a picture with odd metadata from warning, or from failing where warnings are errors.

    A rule for Pillow's modules alone, put in front once: `warnings.catch_warnings` would swap the whole
    process's rules at every image, which threads must not do.
    """
    if warnings.filters[0] != _IGNORE_PILLOW:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _upright(image: ImageFile.ImageFile) -> Image.Image:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image  # its load() has turned it already
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 damaged EXIF fails in many ways; the picture itself is fine
        return image
    return image if method is None else image.transpose(method)


def _to_rgba(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        # A 16-bit PNG: Pillow keeps the high byte of each pixel, but all of the transparent colour.
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA")


def _gray_to_rgb(gray_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.repeat(gray_HW[:, :, np.newaxis], 3, axis=2)


def _deep_to_8_bits(image: Image.Image, source: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
    """Scale one channel of more than 8 bits down, where Pillow's `convert` would clip it."""
    values_HW = np.asarray(image)
    scaled_HW = np.nan_to_num(values_HW.astype(np.float32) * np.float32(255 / _white(values_HW, source)))
    gray_HW: npt.NDArray[np.uint8] = np.rint(scaled_HW.clip(0, 255)).astype(np.uint8)
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        if source.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
            gray_HW = 255 - gray_HW
    elif (transparency := source.info.get("transparency")) is not None:
        gray_HW[values_HW == transparency] = 255
    return gray_HW


def _white(values_HW: npt.NDArray[np.generic], source: ImageFile.ImageFile) -> float:
    """Return the value that stands for white.

    16-bit (or, in TIFF, 12-bit) files say it by their depth. Float and 32-bit files do not: white is the
    first of 1 (float only), 255, 65535 that no pixel exceeds, else the largest value.
    """
    if source.mode.startswith("I;16"):
        tags = getattr(source, "tag_v2", {})
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return float(2**bits - 1)
    largest = float(np.nan_to_num(values_HW, posinf=0).max())
    usual = (1.0, 255.0, 65535.0) if source.mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if largest <= white), largest)
