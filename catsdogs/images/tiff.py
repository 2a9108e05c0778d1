"""Read the first directory of a TIFF or BigTIFF; EXIF data are a TIFF too. Repair what Pillow reads incorrectly.

Sources: TIFF 6.0 section 2; BigTIFF as libtiff specifies it; EXIF 3.0 section 4.6.
"""

import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
PREDICTOR, COLOR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 317, 320, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
UNCOMPRESSED, JPEG, YCBCR = 1, 7, 6
_OLD_JPEG, _WEBP = 6, 50001
_IMPLIES_PHOTOMETRIC = (2, 3, 4, _OLD_JPEG)  # fax, where 0 is white, and YCbCr
_RGB, _CMYK, _LAB = 2, 5, 8
_PREMULTIPLIED, _ALPHA = 1, 2
DIRECTORY_ERRORS = (struct.error, IndexError, OverflowError)  # the latter two for BigTIFF's 64-bit offsets
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_PIECES = ((STRIP_OFFSETS, STRIP_BYTES), (TILE_OFFSETS, TILE_BYTES))
_TYPE_BYTES = dict(zip((*range(1, 14), 16, 17, 18), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 8, 8, 8), strict=True))
_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_BIG_ENTRY_BYTES = 20
_SHORT, _LONG, _LONG8 = 3, 4, (16, 17, 18)
_EXIF_PREFIX = re.compile(rb"\A(Exif\0\0)+")


class Entry(NamedTuple):
    """One entry of a directory, which starts at `position`; its values start at `offset`."""

    tag: int
    value_type: int
    num_values: int
    num_bytes: int
    position: int
    offset: int


@dataclass(frozen=True, slots=True)
class Directory:
    """The first directory of a TIFF, which ends at byte `end`; `order` is `<` or `>`, as in `struct`."""

    tiff: bytes
    order: str
    is_big: bool
    entries: dict[int, Entry]
    end: int

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Read the integers of a tag; struct.error if they are missing."""
        entry = self.entries.get(tag)
        return default if entry is None else _read_integers(self.tiff, self.order, entry) or default

    def number(self, tag: int, default: int = 0) -> int:
        """Read the first integer of a tag."""
        return self.numbers(tag, (default,))[0]


def read_directory(tiff: bytes) -> Directory:
    """Read the first directory; one of DIRECTORY_ERRORS if a part of it is missing."""
    order, is_big = _read_header(tiff)
    entry_format, positions = _find_entries(tiff)
    entries: dict[int, Entry] = {}
    for position in positions:
        entry = _read_entry(tiff, entry_format, position)
        entries.setdefault(entry.tag, entry)
    return Directory(tiff, order, is_big, entries, positions.stop)


def read_orientation(exif: bytes) -> int | None:
    """Read the orientation of EXIF data or of a TIFF, whatever its integer type; None without one."""
    tiff = _EXIF_PREFIX.sub(b"", exif)
    if not tiff.startswith(MAGIC):
        return None
    order, _ = _read_header(tiff)
    tag_format = struct.Struct(f"{order}H")
    try:
        entry_format, positions = _find_entries(tiff)
        for position in positions:
            if tag_format.unpack_from(tiff, position)[0] == ORIENTATION:
                values = _read_integers(tiff, order, _read_entry(tiff, entry_format, position))
                return values[0] if values else None
    except DIRECTORY_ERRORS:
        pass
    return None


def tiff_ends_early(image_bytes: bytes) -> bool:
    """Whether the first directory, its values, its strips or its tiles reach beyond the data."""
    try:
        directory = read_directory(image_bytes)
        ends = [directory.end, *(entry.offset + entry.num_bytes for entry in directory.entries.values())]
        for offsets, lengths in _PIECES:
            pieces = zip(directory.numbers(offsets), directory.numbers(lengths), strict=False)
            ends += [offset + length for offset, length in pieces]
    except DIRECTORY_ERRORS:
        return True
    return max(ends) > len(image_bytes)


def repair_tiff(image_bytes: bytes) -> bytes:
    """Change what Pillow 13 reads incorrectly.

    These are big-endian BigTIFF; an orientation that is a byte; planes of an image that has one sample, for which the
    planar configuration has no meaning; and color maps of 8 bits instead of 16.
    """
    try:
        directory = read_directory(image_bytes)
        if directory.is_big and directory.order == ">":
            directory = read_directory(_to_classic(directory))
        repaired = bytearray(directory.tiff)
        if ORIENTATION in directory.entries:
            _write_short(repaired, directory, ORIENTATION, directory.number(ORIENTATION))
        if directory.number(PLANAR) != 1 and directory.number(SAMPLES, 1) == 1:
            _write_short(repaired, directory, PLANAR, 1)
        colors = directory.numbers(COLOR_MAP)
        if colors and max(colors) < 256 and directory.entries[COLOR_MAP].value_type == _SHORT:
            offset = directory.entries[COLOR_MAP].offset
            struct.pack_into(f"{directory.order}{len(colors)}H", repaired, offset, *(color * 257 for color in colors))
    except DIRECTORY_ERRORS:
        return image_bytes
    return bytes(repaired)


def find_unsupported_feature(image_bytes: bytes) -> str | None:
    """Say with or without what a TIFF is that Pillow opens and reads incorrectly, or not at all; None for others."""
    try:
        directory = read_directory(image_bytes)
        compression = directory.number(COMPRESSION, UNCOMPRESSED)
        if WIDTH not in directory.entries or HEIGHT not in directory.entries:
            return None
        if PHOTOMETRIC not in directory.entries and compression not in _IMPLIES_PHOTOMETRIC:
            return "without a photometric interpretation"
        if is_sparse(directory):
            return "with strips or tiles that are left out (sparse TIFF)"
        if compression == _WEBP:
            return "with WebP compression"
        if _has_unreadable_planes(directory):
            return f"with {directory.number(SAMPLES)} planes of photometric {directory.number(PHOTOMETRIC)}"
        return None
    except DIRECTORY_ERRORS:
        return None


def is_sparse(directory: Directory) -> bool:
    """Whether a strip or tile is left out, as GDAL does where all values are 0."""
    return any(
        (0, 0) in zip(directory.numbers(offsets), directory.numbers(lengths), strict=False)
        for offsets, lengths in _PIECES
    )


def _has_unreadable_planes(directory: Directory) -> bool:
    """Whether each sample has a plane of its own, and Pillow has no mode for these samples."""
    compression, num_samples = directory.number(COMPRESSION, UNCOMPRESSED), directory.number(SAMPLES, 1)
    if directory.number(PLANAR, 1) != 2 or num_samples == 1 or compression in (_OLD_JPEG, JPEG):
        return False
    photometric, extra = directory.number(PHOTOMETRIC), directory.numbers(EXTRA_SAMPLES)
    if photometric in (YCBCR, _LAB):
        return True
    num_colors = {_RGB: 3, _CMYK: 4}.get(photometric, 1)
    is_compressed = compression != UNCOMPRESSED
    if not any(extra):
        return is_compressed and num_samples > num_colors + len(extra)
    return photometric != _RGB or extra not in ((_ALPHA,), (_PREMULTIPLIED,) if is_compressed else ())


def explain_unsupported_tiff(image_bytes: bytes) -> str | None:
    """Say what a TIFF is that Pillow does not support; None if its directory is damaged."""
    if feature := find_unsupported_feature(image_bytes):
        return f"TIFF {feature} is not supported"
    try:
        directory = read_directory(image_bytes)
        numbers = [directory.numbers(tag) for tag in (WIDTH, HEIGHT)]
        if not all(numbers) or not directory.numbers(STRIP_OFFSETS) + directory.numbers(TILE_OFFSETS):
            return None
        bits = "+".join(map(str, directory.numbers(BITS, (1,))[:8]))
        names = {
            "photometric": PHOTOMETRIC,
            "compression": COMPRESSION,
            "sample format": SAMPLE_FORMAT,
            "fill order": FILL_ORDER,
        }
        kind = ", ".join(f"{name} {directory.number(tag, 1)}" for name, tag in names.items())
        return f"TIFF with {bits} bits, {kind} is not supported"
    except DIRECTORY_ERRORS:
        return None


def is_subsampled_without_compression(image_bytes: bytes) -> bool:
    """Whether a TIFF is YCbCr that stores fewer than 3 bytes a pixel uncompressed, which Pillow takes for 3."""
    try:
        directory = read_directory(image_bytes)
        if directory.number(PHOTOMETRIC) != YCBCR or directory.number(COMPRESSION, UNCOMPRESSED) != UNCOMPRESSED:
            return False
        num_bytes = sum(directory.numbers(STRIP_BYTES) + directory.numbers(TILE_BYTES))
        return 0 < num_bytes < 3 * directory.number(WIDTH) * directory.number(HEIGHT)
    except DIRECTORY_ERRORS:
        return False


def _read_header(tiff: bytes) -> tuple[str, bool]:
    return "<" if tiff.startswith(b"II") else ">", b"+" in tiff[2:4]


def _find_entries(tiff: bytes) -> tuple[struct.Struct, range]:
    """Return the format of an entry, and where each starts."""
    order, is_big = _read_header(tiff)
    offset_type, count_type, first = ("Q", "Q", 8) if is_big else ("I", "H", 4)
    (start,) = struct.unpack_from(f"{order}{offset_type}", tiff, first)
    (num_entries,) = struct.unpack_from(f"{order}{count_type}", tiff, start)
    entry_format = struct.Struct(f"{order}HH{offset_type}{offset_type}")
    start += struct.calcsize(count_type)
    return entry_format, range(start, start + num_entries * entry_format.size, entry_format.size)


def _read_entry(tiff: bytes, entry_format: struct.Struct, position: int) -> Entry:
    tag, value_type, num_values, offset = entry_format.unpack_from(tiff, position)
    num_bytes = num_values * _TYPE_BYTES.get(value_type, 0)
    inline_bytes = 8 if entry_format.size == _BIG_ENTRY_BYTES else 4
    if num_bytes <= inline_bytes:
        offset = position + entry_format.size - inline_bytes
    return Entry(tag, value_type, num_values, num_bytes, position, offset)


def _read_integers(tiff: bytes, order: str, entry: Entry) -> tuple[int, ...]:
    """Read the values of an entry; none if they are not integers."""
    code = _NUMBERS.get(entry.value_type)
    return struct.unpack_from(f"{order}{entry.num_values}{code}", tiff, entry.offset) if code else ()


def _write_short(tiff: bytearray, directory: Directory, tag: int, value: int) -> None:
    """Replace an entry, if there is one, by one 16-bit integer."""
    entry = directory.entries.get(tag)
    if entry is not None and 0 <= value < 1 << 16:
        head = struct.Struct(f"{directory.order}HH{'Q' if directory.is_big else 'I'}")
        head.pack_into(tiff, entry.position, tag, _SHORT, 1)
        struct.pack_into(f"{directory.order}H", tiff, entry.position + head.size, value)


def _to_classic(directory: Directory) -> bytes:
    """Append the directory of a BigTIFF as that of a TIFF, whose numbers have 32 bits."""
    order, out = directory.order, bytearray(directory.tiff)
    fields = []
    for entry in sorted(directory.entries.values()):
        values = bytes(directory.tiff[entry.offset : entry.offset + entry.num_bytes])
        value_type = entry.value_type
        if value_type in _LONG8:
            value_type = _LONG
            values = struct.pack(f"{order}{entry.num_values}I", *directory.numbers(entry.tag))
        if len(values) > 4:
            out += values + bytes(len(values) % 2)
            values = struct.pack(f"{order}I", len(out) - len(values) - len(values) % 2)
        fields.append(struct.pack(f"{order}HHI4s", entry.tag, value_type, entry.num_values, values))
    out[:8] = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, len(out))
    return bytes(out + struct.pack(f"{order}H", len(fields)) + b"".join(fields) + bytes(4))
