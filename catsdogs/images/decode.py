"""The bytes of one image file to pixels, or to a status that says why not.

JPEG goes to torchvision (1819 images/s a core where Pillow decodes 666; measured: Zen 4, 404 x 360 photos,
2026-11), everything else to Pillow: torchvision's PNG decoder kills the process on damaged files.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from catsdogs.images.formats import JpegHeader, ends_early, read_jpeg_header, read_plain_jpeg, read_size, sniff
from catsdogs.images.pillow import is_upright, open_image, read_rgb, stored_size
from catsdogs.images.preprocess import MAX_ASPECT_RATIO

MAX_PIXELS = 178_956_970

_HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: the rest is left to Pillow
_SOURCE_PATH = re.compile(r"^\w+, \S+\.cpp:\d+, ")
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoded file.

    `image` is uint8 (H, W, 3), RGB, upright, None unless `status` is ok; `error` is then None. `width` and
    `height` are those stored in the file, before any rotation; None where the header could not be read.
    """

    status: str
    image: npt.NDArray[np.uint8] | None
    error: str | None
    width: int | None
    height: int | None


def decode(image_bytes: bytes, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode one image file; bad bytes become a status, never an exception.

    Args:
        image_bytes: the whole file. Its format is judged from the first bytes.
        max_pixels: width x height above this is `too_large`, judged before any pixel is decoded.

    Raises:
        MemoryError: the pixels do not fit; the file may be fine.
    """
    if not image_bytes:
        return Decoded("empty", None, "0 bytes", None, None)
    kind = sniff(image_bytes)
    if kind is None:
        came = f"starts with {image_bytes[:8]!r}, which is no JPEG, PNG, WebP, GIF, BMP or TIFF"
        return Decoded("unsupported", None, came, None, None)
    if kind == "JPEG":
        return _decode_jpeg(image_bytes, max_pixels)
    return _decode_with_pillow(kind, image_bytes, max_pixels)


def _decode_jpeg(image_bytes: bytes, max_pixels: int) -> Decoded:
    header = read_jpeg_header(image_bytes)
    if header is None:
        return _failed("JPEG", image_bytes, "no frame header", None)
    size = (header.width, header.height)
    if _is_too_large(size, max_pixels):
        return _too_large(size, max_pixels)
    if not _decodable_by_fast_decoder(header):
        return _decode_with_pillow("JPEG", image_bytes, max_pixels)
    from catsdogs.images.tensors import decode_jpeg  # not above: torch, which a driver can do without

    try:
        image = decode_jpeg(image_bytes)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError(f"{header.width} x {header.height} pixels do not fit") from error
        return _failed("JPEG", image_bytes, _reason(error), size)
    return Decoded("ok", image, None, *size)


def read_gpu_decodable_size(image_bytes: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Read width and height of a JPEG that a decoder without our rules turns into the pixels that `decode` does.

    None for all else: other formats and colours, pictures that lie on their side, strips, and files that `decode` would
    give another status than ok by their headers or their end.
    """
    plain = read_plain_jpeg(image_bytes) if sniff(image_bytes) == "JPEG" else None
    if plain is None:
        return None
    size = (plain.width, plain.height)
    if _is_too_large(size, max_pixels) or max(size) > MAX_ASPECT_RATIO * min(size) or not is_upright(plain.exif):
        return None
    return size


def _decodable_by_fast_decoder(header: JpegHeader) -> bool:
    """Leave CMYK and YCCK (four components) to Pillow, which knows Adobe's inverted ones."""
    return header.num_components in (1, 3) and header.marker in _HUFFMAN


def _decode_with_pillow(kind: str, image_bytes: bytes, max_pixels: int) -> Decoded:
    size = read_size(kind, image_bytes)
    try:
        if size is not None and _is_too_large(size, max_pixels):
            return _too_large(size, max_pixels)
        image = open_image(kind, image_bytes)
        size = stored_size(image)
        if _is_too_large(size, max_pixels):
            return _too_large(size, max_pixels)
        return Decoded("ok", read_rgb(image), None, *size)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 Pillow raises whatever the bytes lead it into
        return _failed(kind, image_bytes, _reason(error), size)


def _is_too_large(size: tuple[int, int], max_pixels: int) -> bool:
    return size[0] * size[1] > max_pixels


def _too_large(size: tuple[int, int], max_pixels: int) -> Decoded:
    error = f"{size[0]} x {size[1]} pixels, more than {max_pixels}"
    if max(size) > _MAX_INT32:  # a damaged header; the output's columns are int32
        return Decoded("too_large", None, error, None, None)
    return Decoded("too_large", None, error, *size)


def _failed(kind: str, image_bytes: bytes, reason: str, size: tuple[int, int] | None) -> Decoded:
    width, height = size or (None, None)
    if ends_early(kind, image_bytes):
        error = f"{kind} ends early, after {len(image_bytes)} bytes: {reason}"
        return Decoded("truncated", None, error, width, height)
    return Decoded("decode_error", None, f"damaged {kind}: {reason}", width, height)


def _reason(error: Exception) -> str:
    """Return one short line without torchvision's source path, and never a lone key or number."""
    line = _SOURCE_PATH.sub("", (str(error).splitlines() or [""])[0])[:200]
    return line if " " in line else f"{type(error).__name__} {line}".strip()
