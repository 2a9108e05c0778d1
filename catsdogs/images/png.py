"""Leave out chunks of a PNG that its pixels do not need, and check the pixel data.

Pillow refuses a PNG whose comment or color profile is damaged or large, and does not check the checksum of its pixels.
Source: W3C PNG 3, sections 5.3 (chunks) and 11.3.1 (tRNS).
"""

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE_BYTES = 8
_ANCILLARY = 0x20  # this bit of the first letter of the type: lower case
_TEXT_EXIF = b"Raw profile type exif\0"  # EXIF as ImageMagick writes it to a PNG
_MAX_TEXT_BYTES = 1 << 20
_MAX_EXIF_BYTES = 1 << 22
_GRAY, _RGB = 0, 2
_NUM_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
_MIN_BYTES = 33  # signature and header
_PIECE_BYTES = 1 << 16
# The first column and row of each pass, and the steps to the next.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def simplify_png(image_bytes: bytes) -> bytes:
    """Return a PNG without the ancillary chunks that the decoded image does not depend on, or that are damaged."""
    header = image_bytes[16:26].ljust(10, b"\xff")
    pieces, end = [], _SIGNATURE_BYTES
    metadata: dict[bytes, bytes] = {}  # the last chunk of each kind counts
    for start, stop in _iter_chunks(image_bytes):
        chunk, end = image_bytes[start:stop], stop
        if not chunk[4] & _ANCILLARY:
            pieces.append(chunk)
        elif chunk[4:8] == b"tRNS" and _is_intact(chunk):
            pieces.append(_scale_transparency(chunk, header))
        elif (kind := _find_metadata_kind(chunk)) and _is_intact(chunk):
            metadata[kind] = chunk
    if text := metadata.pop(b"zTXt", None):
        metadata.setdefault(b"eXIf", _to_exif_chunk(text))
    return b"".join([image_bytes[:_SIGNATURE_BYTES], *pieces[:1], *metadata.values(), *pieces[1:], image_bytes[end:]])


def is_cgbi(image_bytes: bytes) -> bool:
    """Whether a PNG is in Apple's format for iOS, whose compressed data have no header and whose colors are BGR."""
    return image_bytes[12:16] == b"CgBI"


def has_damaged_pixels(image_bytes: bytes) -> bool:
    """Whether the checksum of a chunk of pixel data is wrong."""
    chunks = (image_bytes[start:stop] for start, stop in _iter_chunks(image_bytes))
    return any(chunk[4:8] == b"IDAT" and not _is_intact(chunk) for chunk in chunks)


def lacks_rows(image_bytes: bytes) -> bool:
    """Whether the compressed data are whole, but are fewer rows than the image has, which Pillow leaves black."""
    if len(image_bytes) < _MIN_BYTES:
        return False
    num_missing = _count_bytes(image_bytes)
    decompressor = zlib.decompressobj()
    try:
        for start, stop in _iter_chunks(image_bytes):
            if image_bytes[start + 4 : start + 8] == b"IDAT":
                for position in range(start + 8, stop - 4, _PIECE_BYTES):
                    piece = image_bytes[position : min(position + _PIECE_BYTES, stop - 4)]
                    num_missing -= len(decompressor.decompress(piece))
                    if num_missing <= 0:
                        return False
    except zlib.error:
        return False
    return decompressor.eof


def _count_bytes(image_bytes: bytes) -> int:
    """Count the bytes of all rows, each of which starts with the number of its filter."""
    width, height, depth, color_type, _, _, is_interlaced = struct.unpack_from(">IIBBBBB", image_bytes, 16)
    num_bytes = 0
    for left, top, step_x, step_y in _PASSES if is_interlaced else ((0, 0, 1, 1),):
        num_columns, num_rows = -((left - width) // step_x), -((top - height) // step_y)
        if num_columns > 0 and num_rows > 0:
            num_bytes += num_rows * (1 + (num_columns * depth * _NUM_SAMPLES.get(color_type, 0) + 7) // 8)
    return num_bytes


def _iter_chunks(image_bytes: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each chunk starts and ends, up to the end of the image, of the data, or of what looks like chunks."""
    start = _SIGNATURE_BYTES
    while start + 12 <= len(image_bytes):
        stop = start + 12 + int.from_bytes(image_bytes[start : start + 4])
        chunk_type = image_bytes[start + 4 : start + 8]
        if stop > len(image_bytes) or not chunk_type.isalpha() or chunk_type == b"IEND":
            return
        yield start, stop
        start = stop


def _find_metadata_kind(chunk: bytes) -> bytes | None:
    """Return the type of a chunk that may have an orientation; None for other chunks."""
    chunk_type, content = chunk[4:8], chunk[8:-4]
    if chunk_type == b"eXIf":
        return chunk_type
    if not content.startswith(_TEXT_EXIF):
        return None
    is_compressed = content[len(_TEXT_EXIF) : len(_TEXT_EXIF) + 1] != b"\0"
    is_plain = chunk_type == b"tEXt" or (chunk_type == b"iTXt" and not is_compressed)
    return chunk_type if chunk_type == b"zTXt" or (is_plain and len(content) <= _MAX_TEXT_BYTES) else None


def _to_exif_chunk(text: bytes) -> bytes:
    """Convert compressed text, three lines and hexadecimal digits, to a chunk of EXIF; none if it is damaged.

    Pillow limits the size of a text. EXIF data beyond the limit here are left out: the orientation is at their start.
    """
    start = 8 + len(_TEXT_EXIF) + 1
    try:
        lines = zlib.decompressobj().decompress(text[start:-4], 2 * _MAX_EXIF_BYTES).split(b"\n")
        digits = b"".join(lines[3:])
        content = bytes.fromhex(digits[: len(digits) // 2 * 2].decode("latin-1"))
    except (zlib.error, ValueError):
        return b""
    return _build_chunk(b"eXIf", content)


def _build_chunk(chunk_type: bytes, content: bytes) -> bytes:
    checked = chunk_type + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def _is_intact(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _scale_transparency(chunk: bytes, header: bytes) -> bytes:
    """Scale the transparent level of a PNG to 8 bits, as Pillow scales the pixels of 2 and 4 bits.

    Bits beyond the depth have no meaning. Alpha of palettes stays as it is; a chunk that is too short is left out.
    """
    depth, color_type = header[8], header[9]
    if color_type not in (_GRAY, _RGB):
        return chunk
    num_levels = 1 if color_type == _GRAY else 3
    if len(chunk) < 12 + 2 * num_levels:
        return b""
    levels = struct.unpack_from(f">{num_levels}H", chunk, 8)
    scale = {2: 85, 4: 17}.get(depth, 1)
    content = struct.pack(f">{num_levels}H", *((level & (1 << depth) - 1) * scale for level in levels))
    return _build_chunk(b"tRNS", content)
