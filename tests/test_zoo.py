"""Bad and odd files, each with its exact status; thousands of damaged files, none of which kills a process."""

import io
import os
import struct
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from conftest import IMG_SIZE, encode, red_or_blue, solid
from PIL import Image, PngImagePlugin

from benchmarks.faults.inputs import encoded
from catsdogs.data import sandbox
from catsdogs.data.decode import DecodeForInference
from catsdogs.data.decode_messages import DecodeRequest
from catsdogs.data.sandbox import decode_in_subprocess
from catsdogs.images import Preprocessing
from catsdogs.schema import FILES, OK

MAX_PIXELS = 10**6
STAGE = DecodeForInference(Preprocessing(img_size=IMG_SIZE), MAX_PIXELS, batch_size=1000)
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
MUTANTS = 1000


def picture(mode="RGB", size=(40, 36)):
    return solid((200, 20, 60), size).convert(mode)


def gray16():
    return Image.fromarray(np.arange(40 * 36, dtype=np.uint16).reshape(36, 40) * 40)


def float_tiff():
    return Image.fromarray(np.linspace(0, 1, 40 * 36, dtype=np.float32).reshape(36, 40))


def animated(kind):
    buffer = io.BytesIO()
    picture().save(buffer, kind, save_all=True, append_images=[picture().rotate(90)], duration=40)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(picture(), "JPEG", exif=tags)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks):
    """Build a PNG of a declared size from chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)


def flipped_png():
    content = bytearray(encode(picture(), "PNG"))
    at = content.index(b"IDAT") + 40
    content[at : at + 30] = bytes(byte ^ 0xFF for byte in content[at : at + 30])
    return bytes(content)


def damaged_checksum(kind):
    content = bytearray(text_png())
    at = content.index(kind)
    content[at + 4 + int.from_bytes(content[at - 4 : at])] ^= 1
    return bytes(content)


def jpeg_of_size(width, height):
    """Declare another size in a JPEG's frame header."""
    content = bytearray(encode(picture()))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def text_png():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 100_000, zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


JPEG = encode(picture())
WHOLE = {kind: encode(picture(), kind) for kind in FORMATS}
DATA = chunk(b"IDAT", zlib.compress(b"\0" * 99))
ZOO: dict[str, tuple[str, bytes]] = {
    # not an image
    "empty": ("empty", b""),
    "one byte": ("unsupported", b"\xff"),
    "two bytes of a JPEG": ("truncated", b"\xff\xd8"),
    "text": ("unsupported", b"no image\n"),
    "html": ("unsupported", b"<!DOCTYPE html><html>404</html>"),
    "an error message of S3": ("unsupported", b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'),
    "zip": ("unsupported", b"PK\x03\x04" + bytes(60)),
    "pdf": ("unsupported", b"%PDF-1.7\n"),
    "svg": ("unsupported", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "eps": ("unsupported", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "mp4 video": ("unsupported", b"\0\0\0\x18ftypisom" + bytes(40)),
    "jpeg 2000": ("unsupported", encoded(picture(), "JPEG2000")),
    "ppm": ("unsupported", encode(picture(), "PPM")),
    "ico": ("unsupported", encode(picture(), "ICO")),
    "tga": ("unsupported", encode(picture(), "TGA")),
    "zeros": ("unsupported", bytes(1000)),
    "noise": ("unsupported", np.random.default_rng(0).bytes(1000)),
    "git lfs pointer": ("unsupported", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
    "AppleDouble": ("unsupported", b"\0\x05\x16\x07\0\x02\0\0Mac OS X"),
    "a text that starts with BM": ("unsupported", b"BM is how this text begins, not a bitmap"),
    "jpeg of 12 bits": ("unsupported", JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")),
    # whole, but odd
    "jpeg": (OK, JPEG),
    "progressive jpeg": (OK, encoded(picture(), "JPEG", progressive=True)),
    "gray jpeg": (OK, encode(picture("L"))),
    "cmyk jpeg": (OK, encode(picture("CMYK"))),
    "jpeg with trailing bytes": (OK, JPEG + b"trailing" * 20),
    "jpeg with restart markers": (OK, encoded(picture(), "JPEG", restart_marker_rows=1)),
    "jpeg, quality 1": (OK, encoded(picture(), "JPEG", quality=1)),
    "jpeg on its side": (OK, exif(6)),
    "jpeg of no orientation": (OK, exif(99)),
    "jpeg with damaged exif": (OK, encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "png": (OK, WHOLE["PNG"]),
    "png with alpha": (OK, encode(picture("RGBA"), "PNG")),
    "gray png with alpha": (OK, encode(picture("LA"), "PNG")),
    "png of one bit": (OK, encode(picture("1"), "PNG")),
    "png with a palette": (OK, encode(picture("P"), "PNG")),
    "png with a transparent colour": (OK, encoded(picture("P"), "PNG", transparency=0)),
    "png of 16 bits": (OK, encode(gray16(), "PNG")),
    "png with a long comment": (OK, text_png()),
    "png with trailing bytes": (OK, WHOLE["PNG"] + b"trailing"),
    "png with a wrong checksum of its comment": (OK, damaged_checksum(b"zTXt")),
    "gif": (OK, WHOLE["GIF"]),
    "animated gif": (OK, animated("GIF")),
    "webp": (OK, WHOLE["WEBP"]),
    "lossless webp": (OK, encoded(picture(), "WEBP", lossless=True)),
    "webp with alpha": (OK, encode(picture("RGBA"), "WEBP")),
    "animated webp": (OK, animated("WEBP")),
    "animated png": (OK, animated("PNG")),
    "avif": (OK, WHOLE["AVIF"]),
    "avif with alpha": (OK, encode(picture("RGBA"), "AVIF")),
    "animated avif": (OK, animated("AVIF")),
    "bmp": (OK, WHOLE["BMP"]),
    "gray bmp": (OK, encode(picture("L"), "BMP")),
    "tiff": (OK, WHOLE["TIFF"]),
    "tiff, LZW": (OK, encoded(picture(), "TIFF", compression="tiff_lzw")),
    "tiff of 16 bits": (OK, encode(gray16(), "TIFF")),
    "tiff of floats": (OK, encode(float_tiff(), "TIFF")),
    "tiff, cmyk": (OK, encode(picture("CMYK"), "TIFF")),
    "multi-page tiff": (OK, animated("TIFF")),
    "one pixel": (OK, encode(picture(size=(1, 1)), "PNG")),
    "a line": (OK, encode(picture(size=(5000, 1)))),
    "a column": (OK, encode(picture(size=(1, 5000)))),
    "exactly as many pixels as allowed": (OK, encode(Image.new("L", (1000, 1000)), "PNG")),
    # cut
    "jpeg, half": ("truncated", JPEG[: len(JPEG) // 2]),
    "jpeg without its last byte": ("truncated", JPEG[:-1]),
    "jpeg, header only": ("truncated", JPEG[:20]),
    "jpeg, half, with an end marker": ("truncated", JPEG[: len(JPEG) // 2] + b"\xff\xd9"),
    "png, half": ("truncated", WHOLE["PNG"][: len(WHOLE["PNG"]) // 2]),
    "png, signature only": ("truncated", b"\x89PNG\r\n\x1a\n"),
    "png without pixels or an end": ("truncated", png(40, 36)),
    "gif, half": ("truncated", WHOLE["GIF"][: len(WHOLE["GIF"]) // 2]),
    "webp, half": ("truncated", WHOLE["WEBP"][: len(WHOLE["WEBP"]) // 2]),
    "avif, half": ("truncated", WHOLE["AVIF"][: len(WHOLE["AVIF"]) // 2]),
    "avif, brands only": ("truncated", b"\0\0\0\x1cftypavif" + bytes(40)),
    "heic, brands only": ("truncated", b"\0\0\0\x18ftypheic" + bytes(40)),
    "bmp, half": ("truncated", WHOLE["BMP"][: len(WHOLE["BMP"]) // 2]),
    "tiff, half": ("truncated", WHOLE["TIFF"][: len(WHOLE["TIFF"]) // 2]),
    # damaged
    "png with flipped bytes": ("decode_error", flipped_png()),
    "png without pixels": ("decode_error", png(40, 36, chunk(b"IEND", b""))),
    "png of no width": ("decode_error", png(0, 36, DATA, chunk(b"IEND", b""))),
    "jpeg of no height": ("decode_error", jpeg_of_size(40, 0)),
    "jpeg of markers only": ("decode_error", b"\xff\xd8\xff\xd9"),
    "png with a wrong checksum of its pixels": ("decode_error", damaged_checksum(b"IDAT")),
    # too large
    "png, one row too many": ("too_large", encode(Image.new("L", (1000, 1001)), "PNG")),
    "png of 60000 x 60000 by its header": ("too_large", png(60000, 60000, DATA, chunk(b"IEND", b""))),
    "jpeg of 65000 x 65000 by its header": ("too_large", jpeg_of_size(65000, 65000)),
    "a zip bomb of a png": ("too_large", png(30000, 30000, chunk(b"IDAT", zlib.compress(bytes(10**7))))),
}


@pytest.fixture(scope="module", autouse=True)
def _no_child_is_left():
    yield
    sandbox.end_child()


def decode_rows(paths):
    count = len(paths)
    files = pa.table({"path": paths, "size_bytes": [None] * count, "version": [None] * count}, schema=FILES)
    (rows,) = STAGE(files)
    return rows.drop_columns(["image"]).to_pylist()


def test_every_file_has_its_status(tmp_path):
    assert len(ZOO) >= 60
    for name, (_, content) in ZOO.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    rows = decode_rows([f"{tmp_path}/{name}.jpg" for name in ZOO])
    found = {name: row["status"] for name, row in zip(ZOO, rows, strict=True)}
    assert found == {name: status for name, (status, _) in ZOO.items()}
    assert all((row["error"] is None) == (row["status"] == OK) for row in rows)


def test_every_path_that_is_no_file_has_its_status(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("absent.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "whole.jpg").write_bytes(JPEG)
    (tmp_path / "linked.jpg").symlink_to("whole.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    expected = {
        "absent.jpg": "not_found",
        "folder.jpg": "read_error",
        "dangling.jpg": "not_found",
        "circle.jpg": "read_error",
        "linked.jpg": OK,
        "pipe.jpg": "read_error",
        "whole.jpg/inside.jpg": "not_found",
        "zero\0byte.jpg": "read_error",
        f"{'n' * 300}.jpg": "read_error",
    }
    rows = decode_rows([f"{tmp_path}/{name}" for name in expected])
    assert dict(zip(expected, (row["status"] for row in rows), strict=True)) == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_a_thousand_mutants_kill_no_process_and_cost_no_row(kind, monkeypatch):
    forks, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(kind) or fork())
    rng = np.random.default_rng(FORMATS.index(kind))
    whole = red_or_blue("red", 1) if kind == "JPEG" else encode(picture(size=(24, 20)), kind)
    pixels = np.zeros((MUTANTS, IMG_SIZE, IMG_SIZE, 3), np.uint8)
    files = [DecodeRequest(mutate(whole, rng), i, pixels[i]) for i in range(MUTANTS)]
    counts = Counter(result.status for result in decode_in_subprocess(STAGE, files))
    assert counts.total() == MUTANTS
    assert counts.keys() <= {OK, "empty", "unsupported", "truncated", "decode_error", "too_large", "decoder_crash"}
    assert counts[OK] + counts["decode_error"] > MUTANTS / 10
    assert len(forks) <= 1 + (sandbox.MAX_ATTEMPTS + 1) * counts["decoder_crash"]


def mutate(whole, rng):
    """Damage a file: cut it, flip, overwrite, repeat or drop some of its bytes."""
    content = bytearray(whole)
    at, count = int(rng.integers(0, len(content))), int(rng.integers(1, 9))
    match rng.integers(0, 5):
        case 0:
            del content[at:]
        case 1:
            for i in rng.integers(0, len(content), count):
                content[i] ^= 1 << int(rng.integers(0, 8))
        case 2:
            content[at : at + count] = rng.bytes(count)
        case 3:
            content[at:at] = content[at : at + count * 4]
        case _:
            del content[at : at + count]
    return bytes(content)
