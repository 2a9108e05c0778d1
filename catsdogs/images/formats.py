"""Read an image file's format and size without decoding it, and whether its data end early.

Sources: GIF89a section 18; WebP, RFC 9649; PNG, W3C PNG 3 section 5; AVIF and HEIC, ISO/IEC
14496-12 (boxes) and 23008-12 (HEIF). See also `jpeg` and `tiff`.
"""

import struct
from collections.abc import Iterator

from catsdogs.images import tiff
from catsdogs.images.jpeg import jpeg_ends_early
from catsdogs.images.pillow import lacks_jpeg_data
from catsdogs.images.png import lacks_rows

_OTHER_FORMATS: dict[str, bytes | tuple[bytes, ...]] = {
    "PDF": b"%PDF",
    "ZIP": b"PK\x03\x04",
    "gzip": b"\x1f\x8b",
    "XML": b"<?xml",
    "SVG": b"<svg",
    "HTML": (b"<!DOCTYPE", b"<!doctype", b"<html"),
    "PSD": b"8BPS",
    "ICO": b"\0\0\1\0",
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "JPEG 2000": b"\0\0\0\x0cjP  ",
    "Matroska or WebM": b"\x1aE\xdf\xa3",
    "RIFF": b"RIFF",
    "Ogg": b"OggS",
    "a pointer of Git LFS": b"version https://git-lfs",
}
_BMP_HEADER_BYTES = range(12, 125)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SIZE_PATH = (b"meta", b"iprp", b"ipco", b"ispe")
_FULL_BOX_BYTES = 4  # version and flags, before the content of `meta` and `ispe`


def sniff(image_bytes: bytes) -> str | None:
    """Return the format that the first bytes belong to, whatever the file is called; None for any other."""
    if image_bytes.startswith(b"\xff\xd8"):
        return "JPEG"
    if image_bytes.startswith(b"\x89PNG"):
        return "PNG"
    if image_bytes.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if image_bytes.startswith(b"RIFF") and image_bytes[8:12] == b"WEBP":
        return "WebP"
    if image_bytes.startswith(tiff.MAGIC):
        return "TIFF"
    return "BMP" if _is_bmp(image_bytes) else _sniff_heif(image_bytes)


def describe_other_format(image_bytes: bytes) -> str:
    """Describe the first bytes of a file that is no image, without quoting them: it may be any file of the machine."""
    if image_bytes[4:8] == b"ftyp":
        return "starts as MP4 or QuickTime"
    name = next((name for name, magic in _OTHER_FORMATS.items() if image_bytes.startswith(magic)), "no known format")
    return f"starts as {name}"


def _is_bmp(image_bytes: bytes) -> bool:
    """Check more than the letters `BM`, because a text may start with them."""
    if not image_bytes.startswith(b"BM") or len(image_bytes) < 10:
        return False
    if len(image_bytes) < 18:
        return not any(image_bytes[6:10])
    return int.from_bytes(image_bytes[14:18], "little") in _BMP_HEADER_BYTES


def read_size(file_format: str, image_bytes: bytes) -> tuple[int, int] | None:
    """Return width and height of a GIF, WebP, AVIF or HEIC; None for other formats and for a damaged header.

    Pillow would start to decode a GIF or WebP when it opens it.
    """
    if file_format == "GIF" and len(image_bytes) >= 10:
        width, height = struct.unpack_from("<HH", image_bytes, 6)
        return width, height
    if file_format in ("AVIF", "HEIC"):
        return _read_heif_size(image_bytes)
    return _read_webp_size(image_bytes) if file_format == "WebP" and len(image_bytes) >= 30 else None


def _read_webp_size(image_bytes: bytes) -> tuple[int, int] | None:
    chunk = image_bytes[12:16]
    if chunk == b"VP8X":
        width, height = image_bytes[24:27], image_bytes[27:30]
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(image_bytes[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width_bits, height_bits = struct.unpack_from("<HH", image_bytes, 26)
        return width_bits & 0x3FFF, height_bits & 0x3FFF
    return None


def ends_early(file_format: str, image_bytes: bytes) -> bool:
    """Whether a file that a decoder refused is truncated; otherwise it is damaged."""
    if file_format == "JPEG":
        return jpeg_ends_early(image_bytes)
    if file_format in ("AVIF", "HEIC"):
        return _heif_ends_early(image_bytes)
    if file_format == "PNG":
        return b"IEND" not in image_bytes or lacks_rows(image_bytes)
    if file_format == "GIF":
        return not image_bytes.endswith(b"\0;")
    if file_format == "WebP":
        return int.from_bytes(image_bytes[4:8], "little") + 8 > len(image_bytes)
    if file_format == "BMP":
        return len(image_bytes) < 26 or int.from_bytes(image_bytes[2:6], "little") > len(image_bytes)
    assert file_format == "TIFF", file_format
    return tiff.tiff_ends_early(image_bytes) or lacks_jpeg_data(image_bytes)


def _sniff_heif(image_bytes: bytes) -> str | None:
    """Return AVIF or HEIC by the brands of the first box; None for other files, such as MP4 video."""
    if image_bytes[4:8] != b"ftyp":
        return None
    ftyp = image_bytes[8 : int.from_bytes(image_bytes[:4])]
    brands = {ftyp[i : i + 4] for i in range(0, len(ftyp), 4) if i != 4}  # at 4 stands a version
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & _HEIC_BRANDS else None


def _read_heif_size(image_bytes: bytes) -> tuple[int, int] | None:
    """Return width and height of the largest image of the file, before any rotation; None without one.

    Tiles and thumbnails have sizes of their own, which are smaller.
    """
    sizes = [
        struct.unpack_from(">II", image_bytes, start + _FULL_BOX_BYTES)
        for start, end in _find_boxes(image_bytes, 0, len(image_bytes), _SIZE_PATH)
        if end - start >= _FULL_BOX_BYTES + 8
    ]
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def _heif_ends_early(image_bytes: bytes) -> bool:
    """Whether a box reaches beyond the data, or the data end before the box with the pixels."""
    boxes = list(_iter_boxes(image_bytes, 0, len(image_bytes)))
    end = boxes[-1][2] if boxes else 0
    has_pixels = any(box_type == b"mdat" for box_type, _, _ in boxes)
    return end > len(image_bytes) or (not has_pixels and len(image_bytes) - end < 8)


def _find_boxes(image_bytes: bytes, start: int, end: int, path: tuple[bytes, ...]) -> Iterator[tuple[int, int]]:
    """Yield where the content of each box at a path starts and ends."""
    for box_type, content, box_end in _iter_boxes(image_bytes, start, end):
        if box_type == path[0]:
            content_start = content + (_FULL_BOX_BYTES if box_type == b"meta" else 0)
            if len(path) == 1:
                yield content_start, min(box_end, end)
            else:
                yield from _find_boxes(image_bytes, content_start, min(box_end, end), path[1:])


def _iter_boxes(image_bytes: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each box, where its content starts, and where it ends, which may be beyond `end`."""
    while start + 8 <= end:
        size, box_type, content = int.from_bytes(image_bytes[start : start + 4]), image_bytes[start + 4 : start + 8], 8
        if size == 1:  # a 64-bit size follows the type
            size, content = int.from_bytes(image_bytes[start + 8 : start + 16]), 16
        elif size == 0:  # the box ends with the file
            size = end - start
        if size < content:
            return
        yield box_type, start + content, start + size
        start += size
