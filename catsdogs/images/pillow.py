"""Decode files with Pillow to uint8 RGB: orientation, bit depth, palette and alpha included.

Each format's reader is called directly, not through `Image.open`, which could run others, such as Ghostscript for EPS.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
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

from catsdogs.images.depth import Samples, find_white, scale_to_8_bits
from catsdogs.images.jpeg import MISSING_LEVEL
from catsdogs.images.jpeg_tiff import pad_jpegs, read_jpeg_piece_size
from catsdogs.images.png import lacks_rows, simplify_png
from catsdogs.images.preprocess import ImageArray
from catsdogs.images.tiff import find_unsupported_feature, read_orientation, repair_tiff

# Applied before a reader: each reads more files correctly then.
_REPAIRS: dict[str, Callable[[bytes], bytes]] = {"PNG": simplify_png, "TIFF": repair_tiff}
_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
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
        PillowError: Pillow does not understand it, or reads such files incorrectly.
    """
    if file_format == "TIFF" and (feature := find_unsupported_feature(image_bytes)):
        raise PillowError(f"TIFF {feature}")
    repair = _REPAIRS.get(file_format)
    file = io.BytesIO(repair(image_bytes) if repair else image_bytes)
    with pillow_errors():
        return _READERS[file_format](file)


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
    file, tiles = image.fp, image.tile  # load() removes them
    with pillow_errors():
        image.load()
    if isinstance(image, PngImagePlugin.PngImageFile):
        assert isinstance(file, io.BytesIO)
        _check_rows(image, file)
        if tiles[0].args == "RGB;16B" and "transparency" in image.info:
            _add_alpha_of_16_bits(image, file)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        assert isinstance(file, io.BytesIO)
        _check_jpegs(image, file)
    if isinstance(image, GifImagePlugin.GifImageFile):
        return _whiten_outside(_to_rgb(image), tiles[0].extents or (0, 0, *image.size))
    return _to_rgb(image)


def _to_rgb(image: ImageFile.ImageFile) -> ImageArray:
    upright = _to_upright(image)
    if image.mode.startswith(("I", "F")):
        return np.repeat(_gray_to_8_bits(np.asarray(upright), image)[:, :, np.newaxis], 3, axis=2)
    if not upright.has_transparency_data or _has_meaningless_alpha(upright, image):
        return np.array(_convert(upright, "RGB"))
    return rgba_to_rgb(_convert(_convert(upright, "LA") if upright.mode == "La" else upright, "RGBA"))


def rgba_to_rgb(rgba: ImageArray | Image.Image) -> ImageArray:
    """Composite an RGBA image, an array (H, W, 4) or Pillow's, over white."""
    image = Image.fromarray(rgba) if isinstance(rgba, np.ndarray) else rgba
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.array(white.convert("RGB"))


@contextlib.contextmanager
def pillow_errors() -> Iterator[None]:
    """Convert what Pillow raises, which may be any exception, to PillowError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        logger.debug("Pillow refused an image", exc_info=True)
        message = str(error)
        raise PillowError(message if " " in message else f"{type(error).__name__} {message}".strip()) from error


def _check_rows(image: PngImagePlugin.PngImageFile, file: io.BytesIO) -> None:
    """Raise PillowError if the pixel data are too few; then one of the last two rows is 0.

    In an interlaced image, the last to be decoded is a row of an odd number, or a column if there is one row only.
    """
    last_rows = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))
    if (len(last_rows) == 1 or not all(row.any() for row in last_rows)) and lacks_rows(file.getvalue()):
        raise PillowError("the pixel data end before the last row")


def _check_jpegs(image: TiffImagePlugin.TiffImageFile, file: io.BytesIO) -> None:
    """Raise PillowError if pixel data of JPEGs in a TIFF are missing; then a strip or tile ends with a gray pixel."""
    piece_size = read_jpeg_piece_size(file.getvalue())
    if piece_size is None:
        return
    sizes = zip(piece_size, (image.height, image.width), strict=True)
    last = [sorted({*range(step - 1, size, step), size - 1}) for step, size in sizes]
    pixels_HWC = np.atleast_3d(np.asarray(image))[np.ix_(*last)]
    if (pixels_HWC == MISSING_LEVEL).all(axis=2).any() and lacks_jpeg_data(file.getvalue()):
        raise PillowError("pixel data of a JPEG in it are missing")


def lacks_jpeg_data(tiff: bytes) -> bool:
    """Whether JPEGs in a TIFF end before their last pixel: then more data change the pixels."""
    padded = pad_jpegs(tiff)
    if padded is None:
        return False
    try:
        with_missing, with_more = open_image("TIFF", tiff), open_image("TIFF", padded)
        with pillow_errors():
            return not np.array_equal(np.asarray(with_missing), np.asarray(with_more))
    except PillowError:
        return False


def _add_alpha_of_16_bits(image: PngImagePlugin.PngImageFile, file: io.BytesIO) -> None:
    """Make pixels transparent whose 16-bit color is the transparent one; Pillow keeps the high bytes only."""
    low = PngImagePlugin.PngImageFile(io.BytesIO(file.getvalue()))
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # the second bytes, here the low ones
    with pillow_errors():
        low.load()
    color = np.array(image.info.pop("transparency"))
    is_transparent_HWC = (np.asarray(image) == color >> 8) & (np.asarray(low) == color & 255)
    image.putalpha(Image.fromarray(np.where(is_transparent_HWC.all(axis=2), 0, 255).astype(np.uint8)))


def _whiten_outside(image: ImageArray, frame: tuple[int, int, int, int]) -> ImageArray:
    """Make white what the first frame of a GIF does not cover: it is transparent."""
    left, top, right, bottom = frame
    whitened = np.full_like(image, 255)
    whitened[top:bottom, left:right] = image[top:bottom, left:right]
    return whitened


def _convert(image: Image.Image, mode: str) -> Image.Image:
    with pillow_errors():
        return image.convert(mode)


def _to_upright(image: ImageFile.ImageFile) -> Image.Image:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image  # its load() has rotated it
    return to_upright(image, read_exif_orientation(image))


def read_exif_orientation(image: Image.Image) -> int | None:
    """Read the orientation in the EXIF data of an image that is no TIFF; None without one."""
    exif = image.info.get("exif")
    orientation = read_orientation(exif) if isinstance(exif, bytes) else None
    text = image.info.get("Raw profile type exif")  # of PNG
    if orientation is None and isinstance(text, str):
        with contextlib.suppress(ValueError):
            orientation = read_orientation(bytes.fromhex("".join(text.split("\n")[3:])))
    return orientation


def count_frames(image: ImageFile.ImageFile) -> int:
    """Count the frames of an animation, or the pages of a TIFF."""
    with pillow_errors():
        return int(getattr(image, "n_frames", 1))


def to_upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """Rotate or flip by an EXIF orientation; an invalid one leaves the image as it is."""
    method = None if orientation is None else _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


def _has_meaningless_alpha(upright: Image.Image, source: ImageFile.ImageFile) -> bool:
    """Whether alpha is 0 everywhere where it often has no meaning: in BMP, and in TIFF that does not declare it."""
    if upright.mode != "RGBA" or upright.getchannel("A").getextrema() != (0, 0):
        return False
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        return TiffImagePlugin.EXTRASAMPLES not in source.tag_v2
    return isinstance(source, BmpImagePlugin.BmpImageFile)


def _gray_to_8_bits(values_HW: Samples, source: ImageFile.ImageFile) -> ImageArray:
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        (bits, *_) = source.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        white = 2.0**bits - 1 if source.mode.startswith("I;16") else find_white(values_HW)
        gray_HW = scale_to_8_bits(values_HW, white)
        is_inverted = source.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # 0 is white
        return 255 - gray_HW if is_inverted else gray_HW
    gray_HW = scale_to_8_bits(values_HW, find_white(values_HW))
    if (transparency := source.info.get("transparency")) is not None:
        gray_HW[values_HW == transparency] = 255
    return gray_HW
