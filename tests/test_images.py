"""Decoding, preprocessing and augmentation, on images drawn here."""

import io
import json
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import UPRIGHT
from PIL import AvifImagePlugin, Image, PngImagePlugin
from torchvision.transforms import v2

from catsdogs.errors import InputError
from catsdogs.images import MAX_PIXELS, Preprocessing, decode_image
from catsdogs.images.augment import augment, augment_tensors, draw_view
from catsdogs.images.pillow import configure_pillow
from catsdogs.images.tensors import normalize, resize_to_square
from catsdogs.schema import STATUSES

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}


@pytest.fixture(autouse=True)
def _decode_as_the_child_process(monkeypatch):
    """Configure Pillow as the processes do that decode, for the length of a test."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(AvifImagePlugin, "DEFAULT_MAX_THREADS", AvifImagePlugin.DEFAULT_MAX_THREADS)
    with warnings.catch_warnings():
        configure_pillow()
        yield


def photo(width=64, height=48):
    """Draw smooth gradients, with another color in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, 255 - x * 255 / width], axis=2).astype(np.uint8)


def encode(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_ok(decoded, expected, tolerance=0):
    assert (decoded.status, decoded.error) == ("ok", None)
    assert decoded.image.dtype == np.uint8
    assert decoded.image.flags.c_contiguous
    assert decoded.image.flags.writeable
    assert decoded.image.shape == expected.shape
    assert np.abs(decoded.image.astype(int) - expected).max() <= tolerance


def assert_failed(decoded, status):
    assert (decoded.status, decoded.image) == (status, None)
    assert decoded.status in STATUSES
    assert decoded.error
    assert "\n" not in decoded.error
    assert len(decoded.error) < 300


# Formats and modes


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_format_keeps_every_pixel(kind):
    decoded = decode_image(encode(photo(), kind, **LOSSLESS[kind]))
    assert_ok(decoded, photo())
    assert (decoded.width, decoded.height) == (64, 48)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"keep_rgb": True}, {"subsampling": 2}])
def test_jpeg_gives_the_pixels_that_pillow_gives(options):
    image_bytes = encode(photo(), "JPEG", quality=95, **options)
    decoded = decode_image(image_bytes)
    assert_ok(decoded, np.array(Image.open(io.BytesIO(image_bytes)).convert("RGB")))
    assert (decoded.width, decoded.height) == (64, 48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF"])
def test_gray_becomes_three_equal_channels(kind):
    gray = photo()[:, :, 0]
    assert_ok(decode_image(encode(gray, kind)), np.repeat(gray[:, :, None], 3, axis=2), tolerance=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_one_bit_becomes_black_and_white(kind):
    mask = photo()[:, :, 0] > 127
    expected = np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * 255
    assert_ok(decode_image(encode(Image.fromarray(mask), kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_palette_is_looked_up(kind):
    image = Image.fromarray(photo()).quantize(16)
    assert_ok(decode_image(encode(image, kind)), np.array(image.convert("RGB")))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiff_is_read(compression):
    decoded = decode_image(encode(photo(), "TIFF", compression=compression))
    assert_ok(decoded, photo(), tolerance=12 if compression == "jpeg" else 0)


def test_cmyk_tiff_becomes_rgb():
    assert_ok(decode_image(encode(Image.fromarray(photo()).convert("CMYK"), "TIFF")), photo(), tolerance=3)


def test_bytes_after_the_image_are_ignored():
    assert_ok(decode_image(encode(photo(), "PNG") + b"trailing garbage"), photo())


# CMYK


def drop_segment(jpeg, marker):
    at = jpeg.index(bytes([0xFF, marker]))
    length = int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg[:at] + jpeg[at + 2 + length :]


def test_adobe_inverted_cmyk_jpeg_has_the_correct_colors():
    image_bytes = encode(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=95)
    decoded = decode_image(image_bytes)
    assert_ok(decoded, photo(), tolerance=12)
    assert_ok(decoded, np.array(Image.open(io.BytesIO(image_bytes)).convert("RGB")))


def test_ycck_jpeg_gives_the_pixels_that_pillow_gives():
    image_bytes = bytearray(encode(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=95))
    image_bytes[image_bytes.index(b"Adobe") + 11] = 2  # the transform flag: YCCK
    assert_ok(decode_image(bytes(image_bytes)), np.array(Image.open(io.BytesIO(image_bytes)).convert("RGB")))


def test_cmyk_jpeg_without_adobe_marker_gives_the_pixels_that_pillow_gives():
    image_bytes = drop_segment(encode(Image.fromarray(photo()).convert("CMYK"), "JPEG"), 0xEE)
    assert_ok(decode_image(image_bytes), np.array(Image.open(io.BytesIO(image_bytes)).convert("RGB")))


# Depth


def png(width, height, depth, colour, rows, *chunks):
    """Build a PNG of a mode that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    middle = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def ramp():
    """Draw every 8-bit level once in each row, as 16 bits."""
    return np.tile(np.arange(256, dtype=np.uint16) * 257, (2, 1))


def gray(levels):
    return np.repeat(np.asarray(levels, np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    "image_bytes",
    [
        encode(ramp(), "PNG"),
        encode(ramp(), "TIFF"),
        encode(ramp().astype(">u2"), "TIFF"),
        encode(ramp(), "TIFF", compression="tiff_lzw"),
        encode(ramp().astype(np.int32), "TIFF"),
        encode((ramp() / 65535).astype(np.float32), "TIFF"),
        encode((ramp() / 257).astype(np.float32), "TIFF"),
        encode(ramp().astype(np.float32), "TIFF"),
        png(256, 2, 16, 2, np.repeat(ramp().astype(">u2")[:, :, None], 3, axis=2)),
        png(256, 2, 16, 4, np.stack([ramp(), np.full_like(ramp(), 65535)], axis=2).astype(">u2")),
    ],
    ids=["png", "tiff", "big", "lzw", "int32", "float1", "float255", "float65535", "rgb", "alpha"],
)
def test_ramp_of_more_than_8_bits_is_scaled_to_8_bits(image_bytes):
    assert_ok(decode_image(image_bytes), gray(np.tile(np.arange(256), (2, 1))))


def test_12_bits_are_scaled_by_their_depth():
    def entry(tag, kind, value):
        return struct.pack("<HHII", tag, kind, 1, value)

    entries = [entry(*each) for each in [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1)]]
    entries += [entry(273, 4, 200), entry(277, 3, 1), entry(278, 3, 1), entry(279, 4, 3)]
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries)
    assert_ok(decode_image(header.ljust(200, b"\0") + bytes([0xFF, 0xF0, 0x00])), gray([[255, 0]]))


def test_tiff_whose_zero_is_white_is_inverted():
    image_bytes = encode(ramp(), "TIFF", tiffinfo={262: 0})
    assert_ok(decode_image(image_bytes), gray(np.tile(np.arange(255, -1, -1), (2, 1))))


def test_nan_and_infinity_of_a_float_tiff_become_black_and_white():
    values = np.array([[np.nan, np.inf, -np.inf, 0.0, 1.0]], np.float32)
    assert_ok(decode_image(encode(values, "TIFF")), gray([[0, 255, 0, 0, 255]]))


# Alpha


def with_alpha():
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    over_white = photo() * (alpha[:, :, None] / 255) + (255 - alpha[:, :, None].astype(float))
    return Image.fromarray(np.dstack([photo(), alpha])), over_white.round().astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_over_white(kind):
    image, expected = with_alpha()
    decoded = decode_image(encode(image, kind, **LOSSLESS[kind], **({"exact": True} if kind == "WEBP" else {})))
    assert_ok(decoded, expected, tolerance=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_with_alpha_is_composited_over_white(kind):
    image, _ = with_alpha()
    image = image.convert("LA")
    level, alpha = np.moveaxis(np.array(image).astype(float), 2, 0)
    expected = np.repeat((level * alpha / 255 + 255 - alpha).round()[:, :, None], 3, axis=2)
    assert_ok(decode_image(encode(image, kind)), expected, tolerance=1)


def test_transparent_palette_entries_are_white():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    expected = np.array([[[255, 255, 255], [40, 50, 60], [70, 80, 90]]])
    assert_ok(decode_image(encode(image, "PNG", transparency=0)), expected)
    assert_ok(decode_image(encode(image, "PNG", transparency=b"\0\xff\xff")), expected)
    assert_ok(decode_image(encode(image, "GIF", transparency=0)), expected)


def test_half_transparent_palette_entry_is_mixed_with_white():
    image = Image.new("P", (1, 1))
    image.putpalette([0, 0, 0])
    assert_ok(decode_image(encode(image, "PNG", transparency=b"\x80")), np.full((1, 1, 3), 127))


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key"),
    [
        (8, 0, bytes([7, 9]), struct.pack(">H", 7)),
        (16, 0, struct.pack(">2H", 7 * 257, 9 * 257), struct.pack(">H", 7 * 257)),
        (8, 2, bytes([7, 7, 7, 9, 9, 9]), struct.pack(">3H", 7, 7, 7)),
        (16, 2, struct.pack(">6H", *[7 * 257] * 3, *[9 * 257] * 3), struct.pack(">3H", *[7 * 257] * 3)),
    ],
)
def test_transparent_color_of_a_png_is_white(depth, colour, row, key):
    assert_ok(decode_image(png(2, 1, depth, colour, [row], (b"tRNS", key))), gray([[255, 9]]))


# BMP


def bmp(bits, masks, rows, header_bytes=108):
    """Build a BMP whose header says which bits are which color, red, green, blue and alpha."""
    data = b"".join(bytes(row) for row in rows)
    width = len(rows[0]) * 8 // bits
    fields = struct.pack("<IiiHHIIiiII", header_bytes, width, -len(rows), 1, bits, 3, len(data), 0, 0, 0, 0)
    header = (fields + struct.pack("<4I", *masks)).ljust(header_bytes, b"\0")
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + data


MASKS = [
    (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("header_bytes", [56, 108, 124])
def test_alpha_of_a_bmp_that_is_0_everywhere_has_no_meaning(header_bytes, masks):
    channels = [(mask & -mask).bit_length() // 8 for mask in masks]
    for alphas, expected in (([0, 0], [9, 7]), ([255, 255], [9, 7]), ([0, 255], [255, 7])):
        row = np.zeros((2, 4), np.uint8)
        row[:, channels[:3]] = [[9], [7]]
        row[:, channels[3]] = alphas
        assert_ok(decode_image(bmp(32, masks, [row.tobytes()], header_bytes)), gray([expected]))


@pytest.mark.parametrize(
    "image_bytes",
    [
        bmp(16, (0xF00, 0xF0, 0xF, 0), [bytes(8)]),
        bmp(32, (0x3FF00000, 0xFFC00, 0x3FF, 0), [bytes(8)]),
        bmp(2, (0, 0, 0, 0), [bytes(4)]),
        b"BM" + struct.pack("<IHHI", 100, 0, 0, 30) + struct.pack("<IIIHH", 16, 2, 1, 1, 24) + bytes(70),
    ],
    ids=["4-4-4", "10-10-10", "2 bits", "16-byte header"],
)
def test_bmp_of_another_kind_is_unsupported(image_bytes):
    decoded = decode_image(image_bytes)
    assert_failed(decoded, "unsupported")
    assert decoded.error.startswith("Unsupported BMP ")


# Orientation


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF-LZW", "WEBP", "CMYK"])
def test_orientation_is_applied_and_the_stored_size_reported(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, options = Image.fromarray(photo()), {}
    if kind == "CMYK":
        kind, image = "JPEG", image.convert("CMYK")
    elif kind == "TIFF-LZW":
        kind, options = "TIFF", {"compression": "tiff_lzw"}
    decoded = decode_image(encode(image, kind, exif=exif, **options, **LOSSLESS.get(kind, {"quality": 95})))
    assert_ok(decoded, UPRIGHT[orientation](photo()), tolerance=12 if kind == "JPEG" else 0)
    assert (decoded.width, decoded.height) == (64, 48)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(1, "B"), (3, "H"), (4, "I")])
@pytest.mark.parametrize("image_format", ["WEBP", "AVIF"])
def test_orientation_of_every_integer_type_is_applied(image_format, kind, code, order):
    if image_format == "AVIF" and code == "B":
        pytest.skip("Pillow cannot write this")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + struct.pack(f"{order}{code}", 6).ljust(4, b"\0")
    exif = b"Exif\0\0" + magic + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)
    decoded = decode_image(encode(photo(), image_format, exif=exif, quality=95))
    assert_ok(decoded, UPRIGHT[6](decode_image(encode(photo(), image_format, quality=95)).image))


@pytest.mark.parametrize("orientation", [6, 8])
def test_orientation_is_applied_to_16_bits(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_ok(decode_image(encode(ramp(), "PNG", exif=exif)), UPRIGHT[orientation](gray(ramp() // 257)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "CMYK"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + b"\x81" * 40]
)
def test_damaged_exif_leaves_the_image_unrotated(kind, exif):
    image = Image.fromarray(photo())
    if kind == "CMYK":
        kind, image = "JPEG", image.convert("CMYK")
    image_bytes = encode(image, kind, exif=exif, **LOSSLESS.get(kind, {"quality": 95}))
    assert_ok(decode_image(image_bytes), photo(), tolerance=12 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientation_out_of_range_leaves_the_image_unrotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_ok(decode_image(encode(photo(), "PNG", exif=exif)), photo())
    assert_ok(decode_image(encode(photo(), "JPEG", exif=exif, quality=95)), photo(), tolerance=12)


# Animations


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_the_image(kind):
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    image_bytes = encode(red, kind, save_all=True, append_images=[blue], **LOSSLESS.get(kind, {}))
    assert_ok(decode_image(image_bytes), np.array(red))


@pytest.mark.parametrize("options", [{}, {"transparency": 0}])
def test_part_of_a_gif_that_its_first_frame_does_not_cover_is_white(options):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image_bytes = bytearray(encode(image, "GIF", **options))
    image_bytes[6:10] = struct.pack("<HH", 8, 6)  # the screen
    at = image_bytes.index(b"\x2c\0\0\0\0\3\0\2\0")
    image_bytes[at + 1 : at + 5] = struct.pack("<HH", 4, 1)  # left and top
    expected = np.full((6, 8, 3), 255)
    expected[1:3, 4:7] = [40, 50, 60]
    assert_ok(decode_image(bytes(image_bytes)), expected)


# The limit


@pytest.mark.parametrize("kind", FORMATS)
def test_limit_is_inclusive_and_part_of_the_error(kind):
    image_bytes = encode(photo(), kind)
    assert decode_image(image_bytes, max_pixels=64 * 48).status == "ok"
    decoded = decode_image(image_bytes, max_pixels=64 * 48 - 1)
    assert_failed(decoded, "too_large")
    assert "64 x 48" in decoded.error
    assert "3071" in decoded.error
    assert (decoded.width, decoded.height) == (64, 48)


@pytest.mark.parametrize("kind", FORMATS)
def test_limit_is_judged_from_the_header_alone(kind):
    header = encode(noise(48, 64), kind)
    header = header[: header.index(b"\xff\xda") if kind == "JPEG" else 400]
    assert_failed(decode_image(header, max_pixels=100), "too_large")


def test_huge_image_never_reaches_a_decoder():
    assert MAX_PIXELS == 178_956_970
    decoded = decode_image(png(65_000, 65_000, 8, 2, [b""]))
    assert_failed(decoded, "too_large")
    assert str(MAX_PIXELS) in decoded.error


def test_limit_above_that_of_pillow_is_used():
    size = (15_999).to_bytes(3, "little")
    header = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size + size
    assert_failed(decode_image(header), "too_large")
    decoded = decode_image(header, max_pixels=16_000 * 16_000)
    assert_failed(decoded, "decode_error")
    assert "bomb" not in decoded.error


def test_size_beyond_int32_is_only_in_the_error():
    image_bytes = bytearray(encode(photo(), "BMP"))
    image_bytes[18:22] = b"\xff" * 4
    decoded = decode_image(bytes(image_bytes))
    assert_failed(decoded, "too_large")
    assert "4294967295 x 48" in decoded.error
    assert (decoded.width, decoded.height) == (None, None)


# Bad bytes

JUNK = {
    "one byte": (b"\xff", "no known format"),
    "text": (b"not an image at all, only some words", "no known format"),
    "text that begins like a BMP": (b"BMW is a maker of cars and motorcycles", "no known format"),
    "secrets": (b"root:$6$salt$hash:19000:0:99999:7:::", "no known format"),
    "html": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "HTML"),
    "s3 error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "zip": (b"PK\x03\x04" + bytes(60), "ZIP"),
    "mp4": (b"\0\0\0\x18ftypisom" + bytes(60), "MP4 or QuickTime"),
    "ico": (b"\0\0\x01\0\x01\0" + bytes(60), "ICO"),
    "ppm": (b"P6 2 2 255\n" + bytes(12), "no known format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(20), "RIFF"),
    "zeros": (bytes(100), "no known format"),
}


@pytest.mark.parametrize(("junk", "name"), JUNK.values(), ids=JUNK)
def test_bytes_of_no_listed_format_are_unsupported_and_not_quoted(junk, name):
    decoded = decode_image(junk)
    assert_failed(decoded, "unsupported")
    assert decoded.error == f"starts as {name}, expected JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
    assert (decoded.width, decoded.height) == (None, None)


def test_file_without_bytes_is_empty():
    assert_failed(decode_image(b""), "empty")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": True}, {"cmyk": True}], ids=str)
def test_jpeg_cut_anywhere_is_truncated(options):
    image = Image.fromarray(noise(48, 64))
    if options.pop("cmyk", False):
        image = image.convert("CMYK")
    if options.pop("exif", False):
        options["exif"] = b"Exif\0\0" + b"thumbnail" * 10 + b"\xff\xd8\xff\xd9" + b"more" * 10
    image_bytes = encode(image, "JPEG", **options)
    for cut in [
        *range(2, 700),
        *range(700, len(image_bytes), 101),
        *range(len(image_bytes) - 9, len(image_bytes)),
    ]:
        if options.get("exif") and image_bytes[:cut].endswith(b"\xff\xd9"):
            continue  # exactly behind the thumbnail
        assert_failed(decode_image(image_bytes[:cut]), "truncated")


@pytest.mark.parametrize(
    ("kind", "start", "end", "options"),
    [
        ("PNG", 4, 30, {}),
        ("GIF", 6, 30, {}),
        ("WEBP", 12, 1, {}),
        ("WEBP", 12, 2, {"lossless": True}),
        ("BMP", 10, 1, {}),
        ("TIFF", 4, 1, {}),
        ("TIFF", 4, 1, {"compression": "tiff_lzw"}),
        ("TIFF", 4, 1, {"big_tiff": True}),
        ("TIFF", 4, 1, {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_file_cut_anywhere_is_truncated(kind, start, end, options):
    image_bytes = encode(noise(48, 64), kind, **options)
    last = len(image_bytes) - end
    for cut in [*range(start, 260), *range(260, last, 97), last]:
        decoded = decode_image(image_bytes[:cut])
        assert (cut, decoded.status) == (cut, "truncated")
        assert_failed(decoded, "truncated")


def test_size_of_a_truncated_file_is_reported():
    for kind in FORMATS:
        image_bytes = encode(noise(48, 64), kind)
        decoded = decode_image(image_bytes[: len(image_bytes) // 2])
        assert (kind, decoded.width, decoded.height) == (kind, 64, 48)


def flip(image_bytes, rng):
    mutant = bytearray(image_bytes)
    for position in rng.integers(2, len(mutant), rng.integers(1, 4)):
        mutant[position] ^= int(rng.integers(1, 256))
    return bytes(mutant)


@pytest.mark.parametrize("kind", [*FORMATS, "CMYK", "TIFF-LZW", "EXIF"])
def test_flipped_bytes_give_an_image_or_a_status(kind):
    image, options = Image.fromarray(noise(24, 32)), {}
    if kind == "CMYK":
        kind, image = "JPEG", image.convert("CMYK")
    elif kind == "TIFF-LZW":
        kind, options = "TIFF", {"compression": "tiff_lzw"}
    elif kind == "EXIF":
        kind, options["exif"] = "JPEG", Image.Exif()
        options["exif"][0x0112] = 6
    image_bytes = encode(image, kind, **options)
    rng = np.random.default_rng(0)
    for _ in range(300):
        decoded = decode_image(flip(image_bytes, rng), max_pixels=1_000_000)
        if decoded.status == "ok":
            assert decoded.image.shape[2:] == (3,)
        else:
            assert_failed(decoded, decoded.status)


@pytest.mark.parametrize("offset", [b"\xff" * 8, b"\xff" * 7 + b"\x7f"])
def test_big_tiff_with_an_offset_beyond_any_index_is_truncated(offset):
    assert_failed(decode_image(b"II+\0\x08\0\0\0" + offset + bytes(40)), "truncated")


def test_error_is_one_plain_line():
    image_bytes = encode(noise(24, 32), "JPEG")
    assert decode_image(image_bytes[:800]).error == "JPEG ends early, after 800 bytes: Premature end of JPEG file"
    damaged = image_bytes[:2] + b"\xff\xdb\0\1" + image_bytes[2:]
    assert_failed(decode_image(damaged), "decode_error")
    assert decode_image(damaged).error == "cannot decode JPEG: libjpeg-turbo cannot read the header"


def test_png_with_damaged_pixel_data_is_a_decode_error():
    image_bytes = bytearray(encode(noise(24, 32), "PNG"))
    image_bytes[100] ^= 0xFF
    assert_failed(decode_image(bytes(image_bytes)), "decode_error")


def test_png_damaged_at_any_byte_does_not_kill_the_process():
    image_bytes = encode(noise(12, 16), "PNG")
    for position in range(len(image_bytes)):
        mutant = bytearray(image_bytes)
        mutant[position] ^= 0x55
        assert decode_image(bytes(mutant), max_pixels=1_000_000).status in STATUSES


def test_decoding_leaves_the_process_as_it_was():
    code = """
        import io, warnings
        from PIL import Image
        from catsdogs.images import decode_image, torch_decoders  # importing torch adds filters
        before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
        for kind in ("PNG", "JPEG"):
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, kind, exif=b"Exif\\0\\0II*\\0")
            assert decode_image(file.getvalue()).status == "ok"
        assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_configured_process_still_warns_about_other_modules():
    with pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)


def test_missing_memory_for_pillow_is_not_the_fault_of_the_file(monkeypatch):
    def fail(_):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode_image(encode(photo(), "PNG"))


def test_missing_memory_for_libjpeg_is_not_the_fault_of_the_file(monkeypatch):
    def fail(*_, **__):
        raise ValueError("Insufficient memory (case 4)")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    with pytest.raises(MemoryError):
        decode_image(encode(photo(), "JPEG"))


def test_whatever_pillow_raises_is_a_decode_error(monkeypatch):
    def fail(_):
        raise KeyError(7)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    decoded = decode_image(encode(photo(), "PNG"))
    assert_failed(decoded, "decode_error")
    assert decoded.error == "cannot decode PNG: KeyError 7"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("PNG", "pillow.to_upright"),
        ("PNG", "pillow.rgba_to_rgb"),
        ("PNG", "decode.has_damaged_pixels"),
        ("TIFF", "decode.read_deep_tiff"),
        ("JPEG", "decode.read_jpeg_header"),
        ("JPEG", "decode.decode_jpeg"),
    ],
)
def test_a_bug_of_ours_is_raised(kind, name, monkeypatch):
    def fail(*_):
        raise NameError("name 'widht' is not defined")

    monkeypatch.setattr(f"catsdogs.images.{name}", fail)
    image = Image.fromarray(photo())
    with pytest.raises(NameError, match="widht"):
        decode_image(encode(image.convert("RGBA") if kind == "PNG" else image, kind))


# Preprocessing


@pytest.mark.parametrize(
    ("img_size", "crop_pct", "resize_size"),
    [(224, 0.965, 232), (224, 0.875, 256), (288, 1.0, 288), (35, 0.7, 50), (49, 0.7, 70), (193, 0.965, 200)],
)
def test_resize_size_is_exact(img_size, crop_pct, resize_size):
    assert Preprocessing(img_size=img_size, crop_pct=crop_pct).resize_size == resize_size


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (360, 404),
        (500, 300),
        (232, 232),
        (224, 224),
        (100, 80),
        (1, 1),
        (2, 3),
        (1, 300),
        (300, 1),
        (231, 1200),
    ],
)
@pytest.mark.parametrize("img_size", [224, 63])
def test_pixels_equal_those_of_torchvision(height, width, img_size):
    image, preprocessing = noise(height, width), Preprocessing(img_size=img_size)
    reference = v2.Compose([v2.Resize(preprocessing.resize_size, antialias=True), v2.CenterCrop(img_size)])
    expected = reference(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    result = preprocessing(image)
    np.testing.assert_array_equal(result, expected)
    assert result.flags.c_contiguous
    assert result.flags.writeable


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (3, 60_000), (40_000, 7)])
def test_strip_of_any_length_is_resized(height, width):
    assert Preprocessing()(noise(height, width)).shape == (224, 224, 3)


def test_image_of_the_resized_size_is_copied():
    image = noise(232, 232)
    result = Preprocessing()(image)
    np.testing.assert_array_equal(result, image[4:-4, 4:-4])
    assert not np.shares_memory(result, image)


@pytest.mark.parametrize("make", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.transpose(1, 0, 2)])
def test_strided_views_give_the_pixels_of_their_copies(make):
    view = make(noise(300, 250))
    np.testing.assert_array_equal(Preprocessing()(view), Preprocessing()(view.copy()))


def test_read_only_image_is_accepted_and_unchanged():
    image = noise(300, 250)
    image.flags.writeable = False
    before = image.copy()
    Preprocessing()(image)
    augment(image, "light", 64, np.random.default_rng(0))
    augment(image, "affine", 64, np.random.default_rng(0))
    np.testing.assert_array_equal(image, before)


def test_preprocessing_survives_json():
    preprocessing = Preprocessing(img_size=96, crop_pct=0.9, mean=(0.5, 0.5, 0.5))
    assert Preprocessing(**json.loads(json.dumps(asdict(preprocessing)))) == preprocessing


@pytest.mark.parametrize(
    "settings",
    [
        {"img_size": 0},
        {"img_size": 10**9},
        {"crop_pct": 1e-9},
        {"crop_pct": 1.1},
        {"std": (0.2, 0.0, 0.2)},
        {"std": (1e-300, 0.2, 0.2)},
        {"std": (0.2, 0.2, 1e300)},
        {"mean": (0.5,)},
        {"mean": (1e308, 0.5, 0.5)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"interpolation": "bicubic"},
    ],
    ids=str,
)
def test_error_names_the_invalid_setting(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Preprocessing(**settings)


# Normalize


def test_normalize_is_the_formula():
    images = torch.from_numpy(np.stack([noise(5, 6, seed) for seed in range(2)])).permute(0, 3, 1, 2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected.float(), rtol=0, atol=2e-6)


# Augmentation


@pytest.mark.parametrize(
    ("height", "width"), [(360, 404), (500, 300), (32, 32), (20, 24), (1, 1), (2, 3), (1, 300), (300, 1), (64, 700)]
)
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[::2, 1::2] if min(a.shape[:2]) > 1 else a])
def test_resize_to_square_equals_that_of_torchvision(height, width, size, view):
    image = view(noise(height, width))
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    expected = v2.functional.resize(tensor, [size, size], v2.InterpolationMode.BILINEAR, antialias=True)
    assert torch.equal(resize_to_square(image, size), expected)


@pytest.mark.parametrize("kind", ["light", "affine"])
def test_augment_takes_all_randomness_from_the_generator(kind):
    image = noise(60, 80)
    one, same = np.random.default_rng(7), np.random.default_rng(7)
    first = augment(image, kind, 32, one)
    np.random.seed(0)
    torch.manual_seed(0)
    np.testing.assert_array_equal(first, augment(image, kind, 32, same))
    assert not np.array_equal(first, augment(image, kind, 32, one))


@pytest.mark.parametrize("kind", ["light", "affine"])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (1, 1), (2, 1), (1, 5000), (5000, 1), (32, 32)])
def test_augment_returns_a_square_for_any_image(kind, height, width):
    rng = np.random.default_rng(0)
    for _ in range(8):
        result = augment(noise(height, width), kind, 32, rng)
        assert (result.shape, result.dtype) == ((32, 32, 3), np.uint8)
        assert result.flags.c_contiguous
        assert result.flags.writeable


@pytest.mark.parametrize("kind", ["light", "affine"])
def test_augment_flips_about_half_of_the_images(kind):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    rng = np.random.default_rng(0)
    views = [augment(image, kind, 16, rng).astype(int) for _ in range(200)]
    bright_left = sum(view[:, :8].sum() > view[:, 8:].sum() for view in views)
    assert 60 < bright_left < 140


@pytest.mark.parametrize("kind", ["light", "affine"])
def test_augment_keeps_a_constant_color(kind):
    image = np.full((50, 70, 3), (10, 100, 200), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(20):
        np.testing.assert_array_equal(augment(image, kind, 24, rng), np.broadcast_to([10, 100, 200], (24, 24, 3)))


def test_light_shows_at_least_a_quarter_of_the_image():
    x = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image, rng = np.stack([x, x.T, x], axis=2), np.random.default_rng(0)
    for _ in range(50):
        view = augment(image, "light", 64, rng).astype(int)
        assert np.ptp(view[:, :, 0]) * np.ptp(view[:, :, 1]) > 0.23 * 256**2


def test_affine_repeats_the_edges():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[0], image[-1], image[:, 0], image[:, -1] = 255, 255, 255, 255
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert augment(image, "affine", 64, rng).min() >= 127


@pytest.mark.parametrize("kind", ["light", "affine"])
def test_a_batch_of_tensors_has_the_views_of_the_single_images(kind):
    images = [noise(height, width) for height, width in ((40, 60), (61, 33), (8, 200), (1, 1))]
    expected = [augment(image, kind, 32, np.random.default_rng(i)) for i, image in enumerate(images)]
    views = [draw_view(*image.shape[:2], kind, np.random.default_rng(i)) for i, image in enumerate(images)]
    found = augment_tensors([torch.from_numpy(image) for image in images], views, 32)
    differences = np.abs(found.numpy().astype(int) - np.stack(expected))
    assert {view.flipped for view in views} == {True, False}
    assert differences.max() <= 1


def test_augment_of_another_kind_is_an_error():
    with pytest.raises(InputError, match="heavy"):
        augment(noise(8, 8), "heavy", 8, np.random.default_rng(0))
