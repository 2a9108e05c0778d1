"""Find out whether pixel data of JPEGs in a TIFF are missing: insert bits after them, which are read only then."""

import struct

from catsdogs.images import tiff as tags

_LONG = 4
_EOI = b"\xff\xd9"
_BITS = bytes(range(64))
_PADDING = _BITS + b"".join(bytes([0xFF, 0xD0 + i]) + _BITS for i in range(8))  # also after each restart marker


def read_jpeg_piece_size(image_bytes: bytes) -> tuple[int, int] | None:
    """Return height and width of the strips or tiles, 1 and 1 if the image is to be rotated; None if not of JPEG."""
    try:
        directory = tags.read_directory(image_bytes)
        if directory.number(tags.COMPRESSION) != tags.JPEG:
            return None
        if directory.number(tags.ORIENTATION, 1) != 1:
            return 1, 1
        height = directory.number(tags.TILE_HEIGHT) or directory.number(tags.ROWS_PER_STRIP)
        width = directory.number(tags.TILE_WIDTH)
        return (
            height if height > 0 else directory.number(tags.HEIGHT),
            width if width > 0 else directory.number(tags.WIDTH),
        )
    except tags.DIRECTORY_ERRORS:
        return None


def pad_jpegs(image_bytes: bytes) -> bytes | None:
    """Append a copy of every strip or tile, with more bits; None if they are not JPEGs or the directory is damaged."""
    try:
        directory = tags.read_directory(image_bytes)
        if directory.number(tags.COMPRESSION) != tags.JPEG:
            return None
        is_tiled = tags.TILE_OFFSETS in directory.entries
        offsets_tag, lengths_tag = (
            (tags.TILE_OFFSETS, tags.TILE_BYTES) if is_tiled else (tags.STRIP_OFFSETS, tags.STRIP_BYTES)
        )
        padded, offsets, lengths = bytearray(image_bytes), [], []
        for offset, length in zip(directory.numbers(offsets_tag), directory.numbers(lengths_tag), strict=True):
            piece = _pad(image_bytes[offset : offset + length])
            offsets.append(len(padded))
            lengths.append(len(piece))
            padded += piece
        _write_longs(padded, directory, offsets_tag, offsets)
        _write_longs(padded, directory, lengths_tag, lengths)
    except (ValueError, KeyError, *tags.DIRECTORY_ERRORS):
        return None
    return bytes(padded)


def _pad(jpeg: bytes) -> bytes:
    end = jpeg.rfind(_EOI)
    return (jpeg if end < 0 else jpeg[:end]) + _PADDING + _EOI


def _write_longs(tiff: bytearray, directory: tags.Directory, tag: int, values: list[int]) -> None:
    """Replace an entry by 32-bit integers, which are appended if they do not fit into the entry."""
    order, number, inline_bytes = directory.order, "Q" if directory.is_big else "I", 8 if directory.is_big else 4
    data = struct.pack(f"{order}{len(values)}I", *values)
    if len(data) > inline_bytes:
        position = len(tiff)
        tiff += data
        data = struct.pack(f"{order}{number}", position)
    head = struct.pack(f"{order}HH{number}", tag, _LONG, len(values))
    start = directory.entries[tag].position
    tiff[start : start + len(head) + inline_bytes] = head + data.ljust(inline_bytes, b"\0")
