"""PNG files with chunks that Pillow refuses although the pixels are whole, and with damaged pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from catsdogs.images import decode_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE = 0, 2, 3


def chunk(kind, content, damage=0):
    checksum = zlib.crc32(kind + content) ^ damage
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(rows, width, depth, color_type, before=b"", after=b"", idat_damage=0, height=None):
    header = struct.pack(">IIBBBBB", width, height or len(rows), depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    half = len(data) // 2
    pixels = chunk(b"IDAT", data[:half]) + chunk(b"IDAT", data[half:], idat_damage)
    return SIGNATURE + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


ROWS = [bytes((x * 31 + y * 7) % 256 for x in range(30)) for y in range(8)]
PIXELS = np.array([list(row) for row in ROWS], np.uint8).reshape(8, 10, 3)
LARGE = zlib.compress(bytes(3_000_000))


def rgb(**options):
    return png(ROWS, 10, 8, RGB, **options)


def assert_ok(image_bytes, expected):
    decoded = decode_image(image_bytes)
    assert (decoded.status, decoded.error) == ("ok", None)
    np.testing.assert_array_equal(decoded.image, expected)


METADATA = {
    "comment": (b"tEXt", b"Comment\0words"),
    "compressed comment": (b"zTXt", b"Comment\0\0" + zlib.compress(b"words")),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"),
    "resolution": (b"pHYs", bytes(9)),
    "profile": (b"iCCP", b"name\0\0" + zlib.compress(b"profile")),
    "gamma": (b"gAMA", bytes(4)),
    "time": (b"tIME", bytes(7)),
    "EXIF": (b"eXIf", b"II*\0" + bytes(8)),
    "animation": (b"acTL", struct.pack(">II", 2, 0)),
    "private": (b"abCd", b"?"),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_with_a_wrong_checksum_are_ignored(name, where):
    assert_ok(rgb(**{where: chunk(*METADATA[name], damage=1)}), PIXELS)


@pytest.mark.parametrize("damage", [1, 0xFFFFFFFF])
def test_pixel_data_with_a_wrong_checksum_are_a_decode_error(damage):
    decoded = decode_image(rgb(idat_damage=damage))
    assert (decoded.status, decoded.width, decoded.height) == ("decode_error", 10, 8)
    assert decoded.error == "cannot decode PNG: the checksum of the pixel data is wrong"


def test_pixel_data_with_a_wrong_checksum_and_no_end_are_truncated():
    image_bytes = rgb(idat_damage=1)
    assert decode_image(image_bytes[:-12]).status == "truncated"


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
def test_a_wrong_checksum_of_the_header_or_the_palette_is_a_decode_error(kind):
    image_bytes = bytearray(png([b"\0\1"], 2, 8, PALETTE, before=chunk(b"PLTE", bytes(6))))
    at = image_bytes.index(kind)
    image_bytes[at + 4 + int.from_bytes(image_bytes[at - 4 : at])] ^= 1
    assert decode_image(bytes(image_bytes)).status == "decode_error"


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"Comment\0\0" + LARGE),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(3_000_000)),
        (b"tEXt", b"Comment\0" + bytes(70_000_000)),
        (b"iCCP", b"name\0\0" + LARGE),
    ],
    ids=["zTXt", "compressed iTXt", "iTXt", "tEXt", "iCCP"],
)
def test_metadata_of_any_size_are_ignored(kind, content, where):
    assert_ok(rgb(**{where: chunk(kind, content)}), PIXELS)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    "kind", [b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"eXIf"]
)
def test_metadata_that_are_too_short_are_ignored(kind, where):
    assert_ok(rgb(**{where: chunk(kind, b"")}), PIXELS)
    assert_ok(rgb(**{where: chunk(kind, b"\1")}), PIXELS)


@pytest.mark.parametrize(
    ("depth", "row", "level", "expected"),
    [
        (1, [0b01000000], 1, [0, 255, 0]),
        (1, [0b01000000], 0, [255, 255, 255]),
        (2, [0b00011011], 1, [0, 255, 170]),
        (2, [0b00011011], 0, [255, 85, 170]),
        (4, [0x03, 0xF0], 3, [0, 255, 255]),
        (4, [0x13, 0x50], 0xF5, [17, 51, 255]),  # bits beyond the depth have no meaning
        (8, [3, 7, 9], 7, [3, 255, 9]),
    ],
)
def test_transparent_gray_level_is_white(depth, row, level, expected):
    image_bytes = png([row], 3, depth, GRAY, before=chunk(b"tRNS", struct.pack(">H", level)))
    assert_ok(image_bytes, np.repeat(np.array(expected, np.uint8)[None, :, None], 3, axis=2))


def test_transparency_with_a_wrong_checksum_is_ignored():
    image_bytes = png([[3, 7, 9]], 3, 8, GRAY, before=chunk(b"tRNS", b"\0\7", damage=1))
    assert_ok(image_bytes, np.array([[[3] * 3, [7] * 3, [9] * 3]], np.uint8))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(1, "B"), (3, "H"), (4, "I")])
@pytest.mark.parametrize("where", ["before", "after"])
def test_orientation_of_every_integer_type_is_applied(where, kind, code, order):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + struct.pack(f"{order}{code}", 6).ljust(4, b"\0")
    exif = magic + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)
    assert_ok(rgb(**{where: chunk(b"eXIf", exif)}), np.rot90(PIXELS, -1))


def test_orientation_in_a_compressed_text_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()
    image_bytes = rgb(before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    assert_ok(image_bytes, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("where", ["before", "after"])
def test_metadata_of_any_number_are_ignored(where):
    text = chunk(b"tEXt", b"Comment\0" + bytes(1_000_000))
    exif = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(900_000)))
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(1_000_000))
    for each in (text, exif, xmp):
        assert_ok(rgb(**{where: each * 80}), PIXELS)


@pytest.mark.parametrize("num_bytes", [700_000, 9_000_000])
def test_orientation_in_a_large_compressed_text_is_applied(num_bytes):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes() + bytes(num_bytes)
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()
    image_bytes = rgb(before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    assert_ok(image_bytes, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("text", [b"\nexif\n 4\nno hexadecimal digits", b"\nexif\n 4\n4949\xff\xff", b"exif", b""])
def test_damaged_exif_in_a_compressed_text_is_ignored(text):
    assert_ok(rgb(before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))), PIXELS)


def test_orientation_in_xmp_alone_is_ignored():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=info)
    assert_ok(file.getvalue(), PIXELS)


# Transparent color of 16 bits


@pytest.mark.parametrize("key", [(0, 0, 0), (40, 40, 40), (0x1234, 0x5678, 0x9ABC), (65535, 65535, 65535)])
def test_only_pixels_that_equal_the_transparent_color_in_16_bits_are_white(key):
    near = [[min(65535, max(0, key[i] + change * (i == c))) for i in range(3)] for c in range(3) for change in (-1, 1)]
    colors = np.array([key, *near, [0x1200, 0x5600, 0x9A00], [1, 2, 3]], np.uint16)
    expected = np.where((colors == key).all(axis=1, keepdims=True), 255, colors >> 8).astype(np.uint8)[np.newaxis]
    transparency = chunk(b"tRNS", struct.pack(">3H", *key))
    assert_ok(png([colors.astype(">u2").tobytes()], len(colors), 16, RGB, before=transparency), expected)


def test_image_with_a_transparent_color_of_16_bits_is_rotated():
    colors = np.arange(18, dtype=np.uint16).reshape(2, 3, 3) * 300
    expected = (colors >> 8).astype(np.uint8)
    expected[1, 0] = 255
    exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0)
    before = chunk(b"tRNS", struct.pack(">3H", *colors[1, 0])) + chunk(b"eXIf", exif)
    image_bytes = png([row.astype(">u2").tobytes() for row in colors], 3, 16, RGB, before=before)
    assert_ok(image_bytes, np.rot90(expected, -1))


# Missing rows


def interlaced(pixels, num_bytes=None):
    """Write an interlaced 8-bit gray image, whose pixel data may be only some bytes."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [row for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if row.size]
    height, width = pixels.shape
    data = b"".join(b"\0" + row.tobytes() for row in rows)[:num_bytes]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, GRAY, 0, 0, 1))
    return SIGNATURE + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("num_rows", [1, 4, 7])
def test_png_with_fewer_rows_than_its_height_is_truncated(num_rows):
    decoded = decode_image(png(ROWS[:num_rows], 10, 8, RGB, height=8))
    assert (decoded.status, decoded.width, decoded.height) == ("truncated", 10, 8)
    assert decoded.error.endswith(": the pixel data end before the last row")


@pytest.mark.parametrize(
    ("depth", "color_type", "row"),
    [(1, GRAY, 2), (2, GRAY, 3), (8, GRAY, 10), (16, GRAY, 20), (4, PALETTE, 5), (8, 4, 20), (8, 6, 40), (16, 6, 80)],
)
def test_black_rows_are_no_missing_rows(depth, color_type, row):
    before = chunk(b"PLTE", bytes(3)) if color_type == PALETTE else b""
    assert decode_image(png([bytes(row)] * 8, 10, depth, color_type, before=before)).status == "ok"
    assert decode_image(png([bytes(row)] * 7, 10, depth, color_type, before=before, height=8)).status == "truncated"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (1, 9), (2, 1), (3, 5), (9, 1), (8, 8), (11, 13)])
def test_interlaced_png_with_fewer_bytes_than_its_size_is_truncated(height, width):
    for pixels in (np.full((height, width), 9, np.uint8), np.zeros((height, width), np.uint8)):
        assert_ok(interlaced(pixels), np.repeat(pixels[:, :, np.newaxis], 3, axis=2))
        assert decode_image(interlaced(pixels, -1)).status == "truncated"


def test_png_of_apple_for_ios_is_unsupported():
    image_bytes = rgb()
    decoded = decode_image(image_bytes[:8] + chunk(b"CgBI", b"\x50\0\x20\6") + image_bytes[8:])
    assert (decoded.status, decoded.error) == ("unsupported", "Apple's CgBI PNG is not supported")
