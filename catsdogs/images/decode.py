"""Decode one image file to pixels, or to a status that says why there are none.

JPEG is decoded by `libjpeg`, HEIC by torchcodec, TIFF of more than 8 bits by `deep_tiff`, other files by Pillow, whose
decoders survive damaged files.
"""

import logging
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from catsdogs.images.deep_tiff import DeepTiff, decode_deep_tiff, read_deep_tiff
from catsdogs.images.formats import describe_other_format, ends_early, read_size, sniff
from catsdogs.images.jpeg import (
    JpegHeader,
    explain_unsupported_jpeg,
    jpeg_ends_early,
    read_jpeg_header,
    read_plain_jpeg_size,
)
from catsdogs.images.libjpeg import JpegError, decode_jpeg, is_damage, is_missing_data
from catsdogs.images.pillow import PillowError, open_image, read_rgb, read_stored_size, rgba_to_rgb, to_upright
from catsdogs.images.png import has_damaged_pixels, is_cgbi
from catsdogs.images.preprocess import MAX_ASPECT_RATIO, ImageArray
from catsdogs.images.tiff import explain_unsupported_tiff, is_subsampled_without_compression, read_orientation

MAX_PIXELS = 178_956_970  # Pillow's limit, twice its default MAX_IMAGE_PIXELS: 2 * (1 GiB / 4 / 3)

_SOURCE_PATH = re.compile(r"^\w+, \S+\.cpp:\d+, ")
_MAX_INT32 = 2**31 - 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoded file.

    `image` is uint8 (H, W, 3), RGB, upright; None unless `status` is ok. `error` is None if `status` is ok. `width` and
    `height` are those of the file, before any rotation; None if the header cannot be read.
    """

    status: str
    image: ImageArray | None
    error: str | None
    width: int | None
    height: int | None


def decode_image(image_bytes: bytes, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode one image file; bad bytes become a status, never an exception.

    Args:
        image_bytes: the whole file; its first bytes determine the format.
        max_pixels: a file whose header says that it has more is `too_large`, and is not decoded.

    Raises:
        MemoryError: the pixels do not fit; the file may be fine.
    """
    if not image_bytes:
        return Decoded("empty", None, "0 bytes", None, None)
    file_format = sniff(image_bytes)
    if file_format is None:
        error = f"{describe_other_format(image_bytes)}, expected JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
        return Decoded("unsupported", None, error, None, None)
    if file_format == "JPEG":
        return _decode_jpeg(image_bytes, max_pixels)
    size = read_size(file_format, image_bytes)
    if size is None and file_format == "HEIC":
        return _failed(file_format, image_bytes, "no image size", None)
    if size is not None and _is_too_large(size, max_pixels):
        return _too_large(size, max_pixels)
    if size is not None and file_format == "HEIC":
        return _decode_heic(image_bytes, size)
    if file_format == "TIFF" and (tiff := read_deep_tiff(image_bytes)):
        return _decode_deep_tiff(image_bytes, tiff, max_pixels)
    return _decode_with_pillow(file_format, image_bytes, size, max_pixels)


def import_decoders() -> None:
    """Import and load what decoding needs on first use; called before a fork, because a child cannot open files."""
    import catsdogs.images.augment  # noqa: F401
    from catsdogs.images.torch_decoders import load_libraries

    load_libraries()


def read_gpu_decodable_size(image_bytes: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Read width and height of a JPEG that nvJPEG decodes as `decode_image` does; None for all other files."""
    size = read_plain_jpeg_size(image_bytes) if sniff(image_bytes) == "JPEG" else None
    if size is None or _is_too_large(size, max_pixels) or max(size) > MAX_ASPECT_RATIO * min(size):
        return None
    return size


def _decode_jpeg(image_bytes: bytes, max_pixels: int) -> Decoded:
    header = read_jpeg_header(image_bytes)
    if header is None:
        return _failed("JPEG", image_bytes, "no frame header", None)
    size = header.width, header.height
    if _is_too_large(size, max_pixels):
        return _too_large(size, max_pixels)
    if reason := explain_unsupported_jpeg(header):
        return _unsupported(reason, size)
    return _decode_supported_jpeg(image_bytes, header, max_pixels)


def _decode_supported_jpeg(image_bytes: bytes, header: JpegHeader, max_pixels: int) -> Decoded:
    size = header.width, header.height
    try:
        image = decode_jpeg(image_bytes, header)
    except JpegError as error:
        return _decode_suspicious_jpeg(image_bytes, header, error, max_pixels)
    if header.num_components == 4:
        return _decode_with_pillow("JPEG", image_bytes, size, max_pixels)
    orientation = read_orientation(header.exif) if header.exif else None
    if orientation in range(2, 9):
        image = np.array(to_upright(Image.fromarray(image), orientation))
    return Decoded("ok", image, None, *size)


def _decode_suspicious_jpeg(image_bytes: bytes, header: JpegHeader, error: JpegError, max_pixels: int) -> Decoded:
    """Refuse a damaged file; decode one that is only unusual with Pillow."""
    size, reason = (header.width, header.height), _format_reason(error)
    if jpeg_ends_early(image_bytes):
        return _failed("JPEG", image_bytes, reason, size)
    if is_missing_data(error, image_bytes, header):
        return Decoded("truncated", None, f"JPEG lacks pixel data, in {len(image_bytes)} bytes: {reason}", *size)
    if is_damage(error):
        return _failed("JPEG", image_bytes, reason, size)
    decoded = _decode_with_pillow("JPEG", image_bytes, size, max_pixels)
    return decoded if decoded.status == "ok" else _failed("JPEG", image_bytes, reason, size)


def _decode_heic(image_bytes: bytes, size: tuple[int, int]) -> Decoded:
    from catsdogs.images import torch_decoders  # not at the top: the driver needs no torch

    try:
        return Decoded("ok", rgba_to_rgb(torch_decoders.decode_heic(image_bytes)), None, *size)
    except ImportError:
        logger.debug("cannot load libheif", exc_info=True)
        error = "HEIC needs libheif, which is not installed (Debian and Ubuntu: apt install libheif1)"
        return Decoded("unsupported", None, error, *size)
    except torch_decoders.TorchcodecError as error:
        reason = _format_reason(error)
        if "Unsupported feature" in reason:
            return Decoded("unsupported", None, f"HEIC that libheif cannot decode: {reason}", *size)
        return _failed("HEIC", image_bytes, reason, size)


def _decode_with_pillow(file_format: str, image_bytes: bytes, size: tuple[int, int] | None, max_pixels: int) -> Decoded:
    if file_format == "PNG" and is_cgbi(image_bytes):
        return _unsupported("Apple's CgBI PNG is not supported", None)
    if file_format == "TIFF" and is_subsampled_without_compression(image_bytes):
        return _unsupported("TIFF with subsampled YCbCr without compression is not supported", None)
    try:
        image = open_image(file_format, image_bytes)
    except PillowError as error:
        reason = _format_reason(error)
        unsupported = _explain_unsupported(file_format, image_bytes, reason)
        return _unsupported(unsupported, size) if unsupported else _failed(file_format, image_bytes, reason, size)
    try:
        size = read_stored_size(image)
        if _is_too_large(size, max_pixels):
            return _too_large(size, max_pixels)
        if file_format == "PNG" and has_damaged_pixels(image_bytes):
            return _failed(file_format, image_bytes, "the checksum of the pixel data is wrong", size)
        return Decoded("ok", read_rgb(image), None, *size)
    except PillowError as error:
        return _failed(file_format, image_bytes, _format_reason(error), size)


def _decode_deep_tiff(image_bytes: bytes, tiff: DeepTiff, max_pixels: int) -> Decoded:
    size = tiff.width, tiff.height
    if _is_too_large(size, max_pixels):
        return _too_large(size, max_pixels)
    try:
        image = Image.fromarray(decode_deep_tiff(image_bytes, tiff))
    except PillowError as error:
        return _failed("TIFF", image_bytes, _format_reason(error), size)
    return Decoded("ok", np.array(to_upright(image, read_orientation(image_bytes))), None, *size)


def _explain_unsupported(file_format: str, image_bytes: bytes, reason: str) -> str | None:
    """Say what a file is whose header Pillow refuses although it may be whole; None for other files."""
    if file_format == "BMP" and reason.startswith("Unsupported BMP"):
        return reason
    is_tiff = file_format == "TIFF" and not ends_early(file_format, image_bytes)
    return explain_unsupported_tiff(image_bytes) if is_tiff else None


def _is_too_large(size: tuple[int, int], max_pixels: int) -> bool:
    return size[0] * size[1] > max_pixels


def _too_large(size: tuple[int, int], max_pixels: int) -> Decoded:
    error = f"{size[0]} x {size[1]} pixels, more than {max_pixels}"
    if max(size) > _MAX_INT32:  # a damaged header; the output's columns are int32
        return Decoded("too_large", None, error, None, None)
    return Decoded("too_large", None, error, *size)


def _unsupported(error: str, size: tuple[int, int] | None) -> Decoded:
    width, height = size or (None, None)
    return Decoded("unsupported", None, error, width, height)


def _failed(file_format: str, image_bytes: bytes, reason: str, size: tuple[int, int] | None) -> Decoded:
    width, height = size or (None, None)
    if ends_early(file_format, image_bytes):
        error = f"{file_format} ends early, after {len(image_bytes)} bytes: {reason}"
        return Decoded("truncated", None, error, width, height)
    return Decoded("decode_error", None, f"cannot decode {file_format}: {reason}", width, height)


def _format_reason(error: Exception) -> str:
    """Return one short line without torchcodec's source path."""
    return _SOURCE_PATH.sub("", (str(error).splitlines() or [""])[0])[:200].rstrip(".")
