"""TIFF files of every layout, written here byte by byte, because Pillow writes few of them."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from catsdogs.images import decode_image
from catsdogs.images.pillow import configure_pillow
from catsdogs.schema import STATUSES

RAW, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773
WHITE_IS_ZERO, GRAY, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
FORMATS = {"u": 1, "i": 2, "f": 3}
CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}


@pytest.fixture(autouse=True, scope="module")
def _decode_as_the_child_process():
    configure_pillow()


def lzw(data):
    """Compress to 9-bit literal codes; the table is cleared before codes need 10 bits."""
    codes = [code for i in range(0, len(data), 250) for code in (256, *data[i : i + 250])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))


def packbits(data):
    return b"".join(bytes([len(data[i : i + 128]) - 1]) + data[i : i + 128] for i in range(0, len(data), 128))


COMPRESS = {RAW: bytes, LZW: lzw, DEFLATE: zlib.compress, PACKBITS: packbits}


def difference(piece, predictor):
    """Apply predictor 2 or 3 to (rows, columns, samples); returns bytes."""
    if predictor == 2:
        unsigned = piece.astype(piece.dtype.newbyteorder("=")).view(f"u{piece.itemsize}")
        return (
            np.diff(unsigned, axis=1, prepend=unsigned[:, :1] * 0)
            .astype(f"{piece.dtype.str[0]}u{piece.itemsize}")
            .tobytes()
        )
    if predictor == 3:
        rows, _, samples = piece.shape
        octets = piece.astype(piece.dtype.newbyteorder(">")).view(np.uint8).reshape(rows, -1, piece.itemsize)
        octets = octets.transpose(0, 2, 1).reshape(rows, -1, samples)
        return np.diff(octets, axis=1, prepend=octets[:, :1] * 0).tobytes()
    return piece.tobytes()


def split(samples, planar, tile):
    """Yield the pieces of (H, W, S): strips of 7 rows or tiles."""
    planes = [samples[:, :, i : i + 1] for i in range(samples.shape[2])] if planar == 2 else [samples]
    for plane in planes:
        for top in range(0, plane.shape[0], tile or 7):
            if not tile:
                yield plane[top : top + 7]
                continue
            for left in range(0, plane.shape[1], tile):
                piece = plane[top : top + tile, left : left + tile]
                yield np.pad(piece, ((0, tile - piece.shape[0]), (0, tile - piece.shape[1]), (0, 0)))


def write_directory(order, big, fields, pieces, height_tag):
    """Write header, pieces and directory; `fields` is tag -> (type, values)."""
    inline, number, head = (8, "Q", 16) if big else (4, "I", 8)
    body, offsets = bytearray(head), []
    for piece in pieces:
        offsets.append(len(body))
        body += piece
    where, lengths = (324, 325) if height_tag == 323 else (273, 279)
    fields = {**fields, where: (16 if big else 4, offsets), lengths: (4, [len(piece) for piece in pieces])}
    entries = b""
    for tag, (kind, values) in sorted(fields.items()):
        data = struct.pack(f"{order}{len(values)}{CODES[kind]}", *values)
        if len(data) > inline:
            body += bytes(len(body) % 2)
            data, position = b"", len(body)
            body += struct.pack(f"{order}{len(values)}{CODES[kind]}", *values)
            data = struct.pack(f"{order}{number}", position)
        entries += struct.pack(f"{order}HH{number}", tag, kind, len(values)) + data.ljust(inline, b"\0")
    body += bytes(len(body) % 2)
    start = len(body)
    mark = b"II" if order == "<" else b"MM"
    magic = struct.pack(f"{order}HHHQ", 43, 8, 0, start) if big else struct.pack(f"{order}HI", 42, start)
    body[:head] = mark + magic
    return bytes(body + struct.pack(f"{order}{'Q' if big else 'H'}", len(fields)) + entries + bytes(8))


def tiff(samples, photometric, *, order="<", big=False, compression=RAW, planar=1, tile=0, predictor=1, **tags):
    """Write (H, W, S) of any dtype; `tags` is e.g. t338=(3, [2])."""
    samples = np.atleast_3d(samples)
    samples = samples.astype(samples.dtype.newbyteorder(order))
    height, width, num_samples = samples.shape
    fields = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8 * samples.itemsize] * num_samples),
        259: (3, [compression]),
        262: (3, [photometric]),
        277: (3, [num_samples]),
        284: (3, [planar]),
        317: (3, [predictor]),
        339: (3, [FORMATS[samples.dtype.kind]] * num_samples),
        **({322: (4, [tile]), 323: (4, [tile])} if tile else {278: (4, [7])}),
        **{int(name[1:]): value for name, value in tags.items()},
    }
    pieces = [COMPRESS[compression](difference(piece, predictor)) for piece in split(samples, planar, tile)]
    return write_directory(order, big, fields, pieces, 323 if tile else 278)


def packed(rows, width, bits, photometric, *, order="<", big=False, planar=1, compression=RAW, **tags):
    """Write rows of pixels that are packed into bytes already, one sample each."""
    fields = {256: (4, [width]), 257: (4, [len(rows)]), 258: (3, [bits]), 259: (3, [compression])}
    fields |= {262: (3, [photometric]), 277: (3, [1]), 278: (4, [len(rows)]), 284: (3, [planar])}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    return write_directory(order, big, fields, [COMPRESS[compression](b"".join(rows))], 278)


def levels(height=19, width=45, channels=1):
    """Draw every 8-bit level, in another order in each channel."""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    return ((y * 13 + x * 5 + c * 71) % 256).astype(np.uint8)


def gray(pixels):
    return np.repeat(pixels, 3, axis=2)


def assert_ok(image_bytes, expected, tolerance=0):
    decoded = decode_image(image_bytes)
    assert (decoded.status, decoded.error) == ("ok", None)
    assert decoded.image.flags.c_contiguous
    assert decoded.image.shape == expected.shape
    assert np.abs(decoded.image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_16_bit_rgb_in_every_layout_equals_its_high_bytes(order, big, compression):
    pixels = levels(channels=3)
    samples = pixels.astype(np.uint16) * 256 + 200
    for planar, tile, predictor in itertools.product(
        (1, 2), (0, 16), (1, 2) if compression in (LZW, DEFLATE) else (1,)
    ):
        options = {"planar": planar, "tile": tile, "predictor": predictor, "compression": compression}
        assert_ok(tiff(samples, RGB, order=order, big=big, **options), pixels)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("u2", 257),
        ("u4", 16_843_009),
        ("u4", 257),
        ("u8", 72_340_172_838_076_673),
        ("i2", 1),
        ("i4", 257),
        ("i8", 257),
        ("f2", 1 / 255),
        ("f4", 1 / 255),
        ("f8", 1 / 255),
        ("f8", 257.0),
    ],
)
def test_gray_of_every_type_is_scaled_to_8_bits(dtype, scale, order, compression):
    samples = (levels().astype(object) * scale).astype(dtype)
    predictors = ((1, 2, 3) if dtype[0] == "f" else (1, 2)) if compression in (LZW, DEFLATE) else (1,)
    for predictor in predictors:
        assert_ok(tiff(samples, GRAY, order=order, compression=compression, predictor=predictor), gray(levels()))
    assert_ok(tiff(samples, WHITE_IS_ZERO, order=order, compression=compression), 255 - gray(levels()))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [RAW, DEFLATE])
def test_signed_16_bits_have_the_scale_of_unsigned(order, compression):
    samples = levels().astype(np.int16) * 128
    expected = gray(np.rint(samples * (255 / 65535)))
    assert_ok(tiff(samples, GRAY, order=order, compression=compression), expected)


@pytest.mark.parametrize("dtype", ["u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("planar", [1, 2])
def test_rgb_of_32_bits_and_floats_is_scaled_by_one_white(dtype, planar):
    pixels = levels(channels=3)
    samples = (pixels.astype(object) * (257 if dtype[0] == "u" else 1 / 255)).astype(dtype)
    assert_ok(tiff(samples, RGB, planar=planar), pixels)


def test_white_of_unsigned_integers_is_the_type_s_where_the_highest_bit_is_used():
    samples = levels().astype(np.uint32) // 2 * 33_686_018
    assert samples.max() >= 2**31
    assert_ok(tiff(samples, GRAY), gray(levels() // 2 * 2), tolerance=1)


@pytest.mark.parametrize(("extra", "is_alpha"), [([2], True), ([1], True), ([0], False), (None, True)])
@pytest.mark.parametrize("photometric", [GRAY, WHITE_IS_ZERO, RGB])
@pytest.mark.parametrize("planar", [1, 2])
def test_alpha_of_16_bits_is_composited_over_white(extra, is_alpha, photometric, planar):
    channels = 3 if photometric == RGB else 1
    colors = levels(channels=channels)
    alpha = np.where(levels() < 100, 0, 255).astype(np.uint8)
    if extra == [1] and photometric != WHITE_IS_ZERO:  # premultiplied
        colors = np.where(alpha, colors, 0).astype(np.uint8)
    samples = np.concatenate([colors, alpha], axis=2).astype(np.uint16) * 257
    tags = {} if extra is None else {"t338": (3, extra)}
    expected = 255 - colors if photometric == WHITE_IS_ZERO else colors
    expected = np.broadcast_to(np.where(alpha, expected, 255) if is_alpha else expected, (*colors.shape[:2], 3))
    assert_ok(tiff(samples, photometric, planar=planar, **tags), expected)


def test_alpha_that_is_0_everywhere_counts_only_if_it_is_declared():
    pixels = np.concatenate([levels(channels=3), np.zeros_like(levels())], axis=2)
    for samples in (pixels, pixels.astype(np.uint16) * 257):
        assert_ok(tiff(samples, RGB), pixels[:, :, :3])
        assert_ok(tiff(samples, RGB, t338=(3, [2])), np.full_like(pixels[:, :, :3], 255))


@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("compression", [RAW, LZW])
def test_16_bit_cmyk_equals_that_of_8_bits(planar, compression):
    pixels = levels(channels=4)
    expected = decode_image(tiff(pixels, CMYK)).image
    assert_ok(tiff(pixels.astype(np.uint16) * 257, CMYK, planar=planar, compression=compression), expected)


# What is repaired for Pillow


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [RAW, DEFLATE])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_color_map_of_8_bits_equals_that_of_16(bits, compression, order):
    num_colors = 2**bits
    colors = [(i * 37 + c * 80) % 256 for c in range(3) for i in range(num_colors)]
    rows = [bytes((x * 29 + y) % 256 for x in range(4)) for y in range(6)]
    width = 4 * 8 // bits
    options = {"order": order, "compression": compression}
    usual = packed(rows, width, bits, PALETTE, t320=(3, [color * 257 for color in colors]), **options)
    expected = decode_image(usual).image
    assert len(np.unique(expected)) > 2 or bits == 1
    assert_ok(packed(rows, width, bits, PALETTE, t320=(3, colors), **options), expected)


@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, GRAY, PALETTE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_planar_configuration_of_one_sample_has_no_meaning(order, bits, photometric):
    rows = [bytes((x * 29 + y) % 256 for x in range(4)) for y in range(6)]
    tags = {"t320": (3, [i * 257 % 65536 for i in range(3 * 2**bits)])} if photometric == PALETTE else {}
    chunky, planar = (packed(rows, 32 // bits, bits, photometric, order=order, planar=i, **tags) for i in (1, 2))
    assert_ok(planar, decode_image(chunky).image)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("planar", [1, 2])
def test_big_endian_big_tiff_equals_the_classic_one(planar, tile, compression):
    for photometric, channels in ((GRAY, 1), (RGB, 3), (CMYK, 4)):
        options = {"planar": planar, "tile": tile, "compression": compression}
        classic, big = (
            tiff(levels(channels=channels), photometric, order=order, big=is_big, **options)
            for order, is_big in (("<", False), (">", True))
        )
        assert_ok(big, decode_image(classic).image)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_big_endian_big_tiff_of_few_colors_equals_the_classic_one(bits):
    rows = [bytes((x * 29 + y) % 256 for x in range(4)) for y in range(6)]
    tags = {"t320": (3, [i * 257 % 65536 for i in range(3 * 2**bits)])}
    expected = decode_image(packed(rows, 32 // bits, bits, PALETTE, **tags)).image
    assert_ok(packed(rows, 32 // bits, bits, PALETTE, order=">", big=True, **tags), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_orientation_of_every_integer_type_is_applied(dtype, kind, big, order):
    pixels = levels(channels=3)
    samples = pixels if dtype == np.uint8 else pixels.astype(dtype) * 257
    image_bytes = tiff(samples, RGB, order=order, big=big, t274=(kind, [6]))
    assert_ok(image_bytes, np.rot90(pixels, -1))
    assert (decode_image(image_bytes).width, decode_image(image_bytes).height) == (45, 19)


# What is not decoded


def subsampled():
    """Write YCbCr with one pair of colors for 2 x 2 pixels, uncompressed."""
    fields = {256: (4, [8]), 257: (4, [8]), 258: (3, [8, 8, 8]), 259: (3, [RAW]), 262: (3, [YCBCR]), 277: (3, [3])}
    fields |= {278: (4, [8]), 530: (3, [2, 2])}
    return write_directory("<", False, fields, [bytes(96), bytes(96)][:1], 278) + bytes(500)


def find_entry(image_bytes, tag):
    """Return where the entry of a tag starts in a little-endian TIFF."""
    (start,) = struct.unpack_from("<I", image_bytes, 4)
    return next(at for at in itertools.count(start + 2, 12) if struct.unpack_from("<H", image_bytes, at)[0] == tag)


def without(tag, image_bytes):
    """Replace the number of a tag by one without a meaning."""
    at = find_entry(image_bytes, tag)
    return image_bytes[:at] + struct.pack("<H", 65000) + image_bytes[at + 2 :]


def sparse(samples, tile, compression):
    """Leave out the second strip or tile, as GDAL does where all values are 0."""
    out = bytearray(tiff(samples, GRAY, compression=compression, tile=tile))
    for tag in (324, 325) if tile else (273, 279):
        (values,) = struct.unpack_from("<I", out, find_entry(out, tag) + 8)
        struct.pack_into("<I", out, values + 4, 0)
    return bytes(out)


UNSUPPORTED = {
    "subsampled YCbCr": subsampled(),
    "palette of 16 bits": tiff(levels().astype(np.uint16), PALETTE, t320=(3, [0] * 300)),
    "CFA": tiff(levels().astype(np.uint16), 32803),
    "mask": packed([b"\xff"], 8, 1, 4),
    "3 bits": packed([bytes(3)], 8, 3, GRAY),
    "complex": tiff(levels().astype(np.uint32), GRAY, t339=(3, [5])),
    "JPEG 2000": tiff(levels(), GRAY, t259=(3, [34712])),
    "samples of two sizes": tiff(levels(channels=3), RGB, t258=(3, [5, 6, 5])),
    "WebP": tiff(levels(channels=3), RGB, t259=(3, [50001])),
    "CMYK and alpha": tiff(levels(channels=5), CMYK, t338=(3, [2])),
    "CMYK and alpha of 16 bits": tiff(levels(channels=5).astype(np.uint16), CMYK, t338=(3, [2])),
    "CMYK and an undeclared sample of 16 bits": tiff(levels(channels=5).astype(np.uint16), CMYK),
    "planes of YCbCr": tiff(levels(channels=3), YCBCR, planar=2),
    "planes of YCbCr, compressed": tiff(levels(channels=3), YCBCR, planar=2, compression=LZW),
    "planes of L*a*b*": tiff(levels(channels=3), 8, planar=2),
    "planes of premultiplied RGB": tiff(levels(channels=4), RGB, planar=2, t338=(3, [1])),
    "planes of RGB and an undeclared sample": tiff(levels(channels=4), RGB, planar=2, compression=LZW),
    "planes of RGB, alpha and another": tiff(levels(channels=5), RGB, planar=2, compression=LZW, t338=(3, [2, 0])),
    **{
        f"planes of gray and alpha, {compression}": tiff(
            levels(channels=2), GRAY, planar=2, compression=compression, t338=(3, [2])
        )
        for compression in COMPRESS
    },
    **{
        f"no photometric interpretation, {channels} x {dtype}": without(
            262, tiff(levels(channels=channels).astype(dtype), GRAY)
        )
        for channels in (1, 3)
        for dtype in ("u1", "u2")
    },
    **{
        f"sparse, {dtype}, {compression}, {tile}": sparse(levels().astype(dtype), tile, compression)
        for dtype in ("u1", "u2")
        for compression in (RAW, DEFLATE)
        for tile in (0, 16)
    },
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_whole_file_of_another_kind_is_unsupported(name):
    decoded = decode_image(UNSUPPORTED[name])
    assert (decoded.status, decoded.image) == ("unsupported", None)
    assert decoded.error.startswith(("TIFF with ", "TIFF without "))
    assert decoded.error.endswith(" is not supported")


@pytest.mark.parametrize("compression", [RAW, LZW, DEFLATE])
@pytest.mark.parametrize("big", [False, True])
def test_cut_anywhere_is_truncated(big, compression):
    image_bytes = tiff(levels(channels=3).astype(np.uint16), RGB, order=">", big=big, compression=compression)
    for cut in [*range(4, len(image_bytes) - 8, 211), len(image_bytes) - 9]:
        assert (cut, decode_image(image_bytes[:cut]).status) == (cut, "truncated")


def test_strips_that_are_missing_or_too_short_are_a_decode_error():
    samples = levels().astype(np.uint16)
    for tags in ({"t257": (4, [400])}, {"t256": (4, [400])}):
        assert decode_image(tiff(samples, GRAY, compression=DEFLATE, **tags)).status == "decode_error"


def test_limit_is_judged_from_the_directory():
    image_bytes = tiff(levels().astype(np.uint16), GRAY)
    assert decode_image(image_bytes, max_pixels=45 * 19).status == "ok"
    assert decode_image(image_bytes, max_pixels=45 * 19 - 1).status == "too_large"


@pytest.mark.parametrize("compression", [RAW, LZW, DEFLATE])
@pytest.mark.parametrize("tile", [0, 16])
def test_flipped_bytes_give_an_image_or_a_status(tile, compression):
    image_bytes = tiff(levels(channels=3).astype(np.uint16), RGB, tile=tile, compression=compression)
    rng = np.random.default_rng(0)
    for _ in range(100):
        mutant = bytearray(image_bytes)
        for position in rng.integers(len(mutant) * 3 // 4, len(mutant), 3):
            mutant[position] = int(rng.integers(256))
        assert decode_image(bytes(mutant), max_pixels=1_000_000).status in STATUSES


def test_fax_without_a_photometric_interpretation_has_white_zeros():
    file = io.BytesIO()
    Image.fromarray(levels()[:, :, 0] > 99).save(file, "TIFF", compression="group4", tiffinfo={262: WHITE_IS_ZERO})
    assert_ok(without(262, file.getvalue()), decode_image(file.getvalue()).image)


@pytest.mark.parametrize(("photometric", "extra"), [(RGB, None), (RGB, [2]), (RGB, [0]), (CMYK, None), (CMYK, [0])])
@pytest.mark.parametrize("compression", [RAW, LZW])
def test_planes_of_8_bits_equal_the_chunky_image_or_are_unsupported(compression, photometric, extra):
    samples = levels(channels=(3 if photometric == RGB else 4) + len(extra or ()))
    tags = {} if extra is None else {"t338": (3, extra)}
    planar = tiff(samples, photometric, planar=2, compression=compression, **tags)
    if compression == RAW and extra == [0]:
        assert decode_image(planar).status == "unsupported"
    else:
        assert_ok(planar, decode_image(tiff(samples, photometric, **tags)).image)


def jpeg_strips(mode, cut, has_end, order, big, **tags):
    """Write three strips of JPEG, the second of which has half of its pixel data if `cut`."""
    pixels = (np.random.default_rng(0).integers(0, 256, (48, 32, 3))).astype(np.uint8)
    pieces = []
    for i in range(3):
        file = io.BytesIO()
        Image.fromarray(pixels[16 * i : 16 * i + 16]).convert(mode).save(file, "JPEG")
        pieces.append(file.getvalue())
    if cut:
        pieces[1] = pieces[1][: -len(pieces[1]) // 4] + (b"\xff\xd9" if has_end else b"")
    bits, photometric = ([8], GRAY) if mode == "L" else ([8, 8, 8], YCBCR)
    fields = {256: (4, [32]), 257: (4, [48]), 258: (3, bits), 259: (3, [7]), 262: (3, [photometric])}
    fields |= {277: (3, [len(bits)]), 278: (4, [16])} | ({530: (3, [2, 2])} if mode == "RGB" else {})
    fields |= {int(name[1:]): value for name, value in tags.items()}
    return write_directory(order, big, fields, pieces, 278)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("has_end", [True, False])
@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_strip_of_jpeg_without_all_of_its_pixel_data_is_truncated(order, big, has_end, mode):
    assert decode_image(jpeg_strips(mode, False, has_end, order, big)).status == "ok"
    decoded = decode_image(jpeg_strips(mode, True, has_end, order, big))
    assert (decoded.status, decoded.width, decoded.height) == ("truncated", 32, 48)


def test_strip_of_jpeg_of_a_rotated_image_without_all_of_its_pixel_data_is_truncated():
    for cut, status in ((False, "ok"), (True, "truncated")):
        assert decode_image(jpeg_strips("RGB", cut, True, "<", False, t274=(3, [6]))).status == status


def test_gray_jpeg_in_a_tiff_is_whole():
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (128, 128, 128)).save(file, "TIFF", compression="jpeg")
    assert_ok(file.getvalue(), np.full((40, 40, 3), 128))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "F"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "group4", "jpeg"])
def test_files_that_pillow_writes_have_the_pixels_that_pillow_reads(mode, compression):
    if (mode != "1" and compression == "group4") or (mode in ("1", "P", "I;16", "F", "LAB") and compression == "jpeg"):
        pytest.skip("Pillow cannot write this")
    image = Image.fromarray(gray(levels())).convert("L").convert("RGB").convert("L" if mode in ("I;16", "F") else mode)
    file = io.BytesIO()
    image.convert(mode).save(file, "TIFF", compression=compression)
    with Image.open(file) as expected:
        if mode == "I;16":
            return assert_ok(file.getvalue(), gray(np.rint(np.atleast_3d(expected) * (255 / 65535))))
        if mode == "F":
            return assert_ok(file.getvalue(), gray(levels()))
        return assert_ok(file.getvalue(), np.array(expected.convert("RGB")))
