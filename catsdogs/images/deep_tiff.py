"""Decode TIFF files of 16, 32 or 64 bits per sample, of which Pillow reads some as noise and refuses many.

libtiff, through Pillow, decompresses each strip or tile as if it were an 8-bit image. NumPy then applies the
predictor, the byte order and the planes. Sources: TIFF 6.0 sections 14 and 18; Adobe Photoshop TIFF Technical Note 3.

H height, W width, S samples of a pixel.
"""

import io
import itertools
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from catsdogs.images import tiff as tags
from catsdogs.images.depth import Samples, find_white, scale_to_8_bits
from catsdogs.images.pillow import PillowError, pillow_errors, rgba_to_rgb
from catsdogs.images.preprocess import ImageArray

_NUM_COLORS = {0: 1, 1: 1, 2: 3, 5: 4}  # of gray, of which white or black is 0, RGB and CMYK
_WHITE_IS_ZERO, _CMYK = 0, 5
_COMPRESSIONS = {
    tags.UNCOMPRESSED,
    5,
    8,
    32773,
    32946,
    34925,
    50000,
}  # LZW, deflate, PackBits, deflate, LZMA, Zstandard
_WITHOUT_PREDICTOR = {tags.UNCOMPRESSED, 32773}
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_DTYPES = {"u2", "u4", "u8", "i2", "i4", "i8", "f2", "f4", "f8"}
_DIFFERENCES, _FLOAT_DIFFERENCES = 2, 3
_PREMULTIPLIED, _ALPHA = 1, 2
_STRIP_HEADER_BYTES = 10 + 9 * 12 + 4
_MAX_TILE_PIXELS = 1 << 26  # a larger one has a damaged size


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepTiff:
    """How the samples of a TIFF are stored; a piece is a strip or a tile, of one plane if `is_planar`."""

    width: int
    height: int
    num_samples: int
    dtype: np.dtype[np.generic]
    photometric: int
    extra_samples: tuple[int, ...]
    compression: int
    predictor: int
    is_planar: bool
    is_tiled: bool
    piece_height: int
    piece_width: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def read_deep_tiff(image_bytes: bytes) -> DeepTiff | None:
    """Read the layout of a TIFF; None unless it is gray, RGB or CMYK of more than 8 bits per sample."""
    try:
        directory = tags.read_directory(image_bytes)
        num_samples = directory.number(tags.SAMPLES, 1)
        bits = set(directory.numbers(tags.BITS, (1,)))
        kinds = set(directory.numbers(tags.SAMPLE_FORMAT, (1,)))
        photometric = directory.number(tags.PHOTOMETRIC, -1)
        compression = directory.number(tags.COMPRESSION, tags.UNCOMPRESSED)
        if len(bits) != 1 or len(kinds) != 1 or num_samples < _NUM_COLORS.get(photometric, num_samples + 1):
            return None
        if tags.is_sparse(directory) or (photometric == _CMYK and _has_alpha(directory, num_samples)):
            return None
        dtype = f"{_KINDS.get(kinds.pop(), '')}{bits.pop() // 8}"
        if dtype not in _DTYPES or compression not in _COMPRESSIONS or directory.number(tags.FILL_ORDER, 1) != 1:
            return None
        return _read_layout(directory, np.dtype(directory.order + dtype), num_samples)
    except tags.DIRECTORY_ERRORS:
        return None


def _has_alpha(directory: tags.Directory, num_samples: int) -> bool:
    """Whether CMYK has a fifth sample that is alpha, or undeclared."""
    extra = directory.numbers(tags.EXTRA_SAMPLES)
    return num_samples > _NUM_COLORS[_CMYK] and (not extra or any(extra))


def _read_layout(directory: tags.Directory, dtype: np.dtype[np.generic], num_samples: int) -> DeepTiff | None:
    width, height = directory.number(tags.WIDTH), directory.number(tags.HEIGHT)
    is_tiled = tags.TILE_OFFSETS in directory.entries
    offsets = directory.numbers(tags.TILE_OFFSETS if is_tiled else tags.STRIP_OFFSETS)
    piece_height = directory.number(tags.TILE_HEIGHT) if is_tiled else directory.number(tags.ROWS_PER_STRIP, height)
    piece_width = directory.number(tags.TILE_WIDTH) if is_tiled else width
    is_odd = is_tiled and piece_height * piece_width > _MAX_TILE_PIXELS
    if min(width, height, piece_height, piece_width) < 1 or is_odd or not offsets:
        return None
    return DeepTiff(
        width=width,
        height=height,
        num_samples=num_samples,
        dtype=dtype,
        photometric=directory.number(tags.PHOTOMETRIC),
        extra_samples=directory.numbers(tags.EXTRA_SAMPLES),
        compression=directory.number(tags.COMPRESSION, tags.UNCOMPRESSED),
        predictor=directory.number(tags.PREDICTOR, 1),
        is_planar=num_samples > 1 and directory.number(tags.PLANAR, 1) == 2,
        is_tiled=is_tiled,
        piece_height=piece_height if is_tiled else min(piece_height, height),
        piece_width=piece_width,
        offsets=offsets,
        lengths=directory.numbers(tags.TILE_BYTES if is_tiled else tags.STRIP_BYTES) or (len(directory.tiff),),
    )


def decode_deep_tiff(image_bytes: bytes, tiff: DeepTiff) -> ImageArray:
    """Decode to uint8 (H, W, 3), not rotated.

    Raises:
        PillowError: the data are damaged or end early.
    """
    samples_HWS = _read_samples(image_bytes, tiff)
    if tiff.num_samples == 1:
        gray_HW1 = scale_to_8_bits(samples_HWS, find_white(samples_HWS))
        return np.repeat(255 - gray_HW1 if tiff.photometric == _WHITE_IS_ZERO else gray_HW1, 3, axis=2)
    num_colors = _NUM_COLORS[tiff.photometric]
    if samples_HWS.dtype != np.uint8:
        samples_HWS = scale_to_8_bits(samples_HWS, find_white(samples_HWS[:, :, :num_colors]))
    colors_HWC = samples_HWS[:, :, :num_colors]
    if tiff.photometric == _CMYK:
        return np.array(_to_pillow("CMYK", colors_HWC).convert("RGB"))
    if num_colors == 1:
        colors_HWC = np.repeat(255 - colors_HWC if tiff.photometric == _WHITE_IS_ZERO else colors_HWC, 3, axis=2)
    return _composite(colors_HWC, samples_HWS[:, :, num_colors:], tiff.extra_samples)


def _composite(colors_HWC: ImageArray, extra_HWS: ImageArray, kinds: tuple[int, ...]) -> ImageArray:
    """Composite colors over white by the first of the other samples that is alpha."""
    is_declared = bool(kinds)
    alphas = [i for i, kind in enumerate(kinds or (_ALPHA,)) if kind in (_PREMULTIPLIED, _ALPHA)]
    if not alphas or alphas[0] >= extra_HWS.shape[2]:
        return np.ascontiguousarray(colors_HWC)
    alpha_HW = extra_HWS[:, :, alphas[0]]
    if not is_declared and not alpha_HW.any():
        return np.ascontiguousarray(colors_HWC)
    mode = "RGBa" if kinds and kinds[alphas[0]] == _PREMULTIPLIED else "RGBA"
    return rgba_to_rgb(_to_pillow(mode, np.dstack([colors_HWC, alpha_HW])).convert("RGBA"))


def _to_pillow(mode: str, values_HWC: ImageArray) -> Image.Image:
    height, width = values_HWC.shape[:2]
    return Image.frombytes(mode, (width, height), values_HWC.tobytes())


def _read_samples(image_bytes: bytes, tiff: DeepTiff) -> Samples:
    """Read all pieces to (H, W, S); 16-bit samples become 8-bit where a pixel has several, as Pillow does."""
    num_planes = tiff.num_samples if tiff.is_planar else 1
    is_short = tiff.dtype.newbyteorder("=") == np.uint16 and tiff.num_samples > 1
    dtype = np.dtype(np.uint8) if is_short else tiff.dtype.newbyteorder("=")
    samples_HWS = np.zeros((tiff.height, tiff.width, tiff.num_samples), dtype)
    tops, lefts = range(0, tiff.height, tiff.piece_height), range(0, tiff.width, tiff.piece_width)
    if len(tiff.offsets) < num_planes * len(tops) * len(lefts):
        raise PillowError(f"{len(tiff.offsets)} strips or tiles are too few")
    pieces = itertools.product(range(num_planes), tops, lefts)
    lengths = itertools.chain(tiff.lengths, itertools.repeat(len(image_bytes)))
    for (plane, top, left), offset, length in zip(pieces, tiff.offsets, lengths, strict=False):
        num_rows = tiff.piece_height if tiff.is_tiled else min(tiff.piece_height, tiff.height - top)
        piece = _read_piece(image_bytes, tiff, offset, length, num_rows)[: tiff.height - top, : tiff.width - left]
        stop = plane + 1 if tiff.is_planar else tiff.num_samples
        target = samples_HWS[top : top + num_rows, left : left + tiff.piece_width, plane:stop]
        target[...] = piece >> 8 if is_short else piece
    return samples_HWS


def _read_piece(image_bytes: bytes, tiff: DeepTiff, offset: int, length: int, num_rows: int) -> Samples:
    """Read one strip or tile to (rows, columns, samples of the piece)."""
    num_samples = 1 if tiff.is_planar else tiff.num_samples
    row_bytes = tiff.piece_width * num_samples * tiff.dtype.itemsize
    if tiff.compression == tags.UNCOMPRESSED:
        data = np.frombuffer(image_bytes[offset : offset + num_rows * row_bytes], np.uint8)
    else:
        data = _decompress(image_bytes[offset : offset + length], tiff.compression, num_rows, row_bytes)
    if data.size != num_rows * row_bytes:
        raise PillowError(f"the strip or tile at byte {offset} ends early")
    return _undo_predictor(data.reshape(num_rows, row_bytes), tiff, num_samples)


def _undo_predictor(rows: ImageArray, tiff: DeepTiff, num_samples: int) -> Samples:
    """Convert the bytes of rows to values in native byte order; differences become sums, which wrap around."""
    num_rows = len(rows)
    shape = (num_rows, tiff.piece_width, num_samples)
    predictor = tiff.predictor if tiff.compression not in _WITHOUT_PREDICTOR else 1
    if predictor == _FLOAT_DIFFERENCES:  # of bytes, all of the most significant first
        sums = rows.reshape(num_rows, -1, num_samples).cumsum(axis=1, dtype=np.uint8)
        planes = sums.reshape(num_rows, tiff.dtype.itemsize, -1).transpose(0, 2, 1)
        big_endian = np.ascontiguousarray(planes).view(tiff.dtype.newbyteorder(">"))
        return big_endian.reshape(shape).astype(tiff.dtype.newbyteorder("="))
    values: Samples = rows.view(tiff.dtype).reshape(shape)
    values = values.astype(tiff.dtype.newbyteorder("="))
    if predictor == _DIFFERENCES:
        unsigned = np.dtype(f"u{tiff.dtype.itemsize}")
        values = values.view(unsigned).cumsum(axis=1, dtype=unsigned).view(values.dtype)
    return values


def _decompress(data: bytes, compression: int, num_rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Decompress one strip or tile as an 8-bit gray image of one strip."""
    fields = {
        tags.WIDTH: row_bytes,
        tags.HEIGHT: num_rows,
        tags.BITS: 8,
        tags.COMPRESSION: compression,
        tags.PHOTOMETRIC: 1,
        tags.STRIP_OFFSETS: _STRIP_HEADER_BYTES,
        tags.SAMPLES: 1,
        tags.ROWS_PER_STRIP: num_rows,
        tags.STRIP_BYTES: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    header = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries + bytes(4)
    with pillow_errors():
        return np.asarray(TiffImagePlugin.TiffImageFile(io.BytesIO(header + data))).ravel()
