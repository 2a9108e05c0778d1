"""JPEG files whose data end early in spite of an end marker, whose EXIF data are unusual, or that no decoder reads."""

import io
import struct

import numpy as np
import pytest
from conftest import UPRIGHT
from PIL import Image

from catsdogs.images import decode_image

EOI = b"\xff\xd9"


def photo(width=130, height=98, seed=0):
    """Draw smooth gradients under some noise, so that every block has pixel data."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 200 / width, y * 200 / height, 200 - x * 200 / width], axis=2)
    return (smooth + np.random.default_rng(seed).integers(0, 50, (height, width, 3))).astype(np.uint8)


def jpeg(mode="RGB", image=None, **options):
    file = io.BytesIO()
    Image.fromarray(photo() if image is None else image).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def pixels(image_bytes):
    return np.array(Image.open(io.BytesIO(image_bytes)).convert("RGB"))


def cut(image_bytes, share):
    """Keep a share of the pixel data, up to the end of a code as an interrupted upload would, and add an end marker."""
    start = image_bytes.index(b"\xff\xda") + 20
    return image_bytes[: start + int((len(image_bytes) - start) * share)].rstrip(b"\xff") + EOI


KINDS = {
    "usual": {},
    "without subsampling": {"subsampling": 0},
    "RGB": {"keep_rgb": True},
    "gray": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "restarts": {"restart_marker_blocks": 3},
    "restart rows": {"restart_marker_rows": 1},
    "quality 5": {"quality": 5},
    "optimized": {"optimize": True},
}


# Data that end early


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.97])
def test_jpeg_that_lacks_data_before_its_end_marker_is_truncated(kind, share):
    decoded = decode_image(cut(jpeg(**KINDS[kind]), share))
    assert (decoded.status, decoded.image, decoded.width, decoded.height) == ("truncated", None, 130, 98)
    assert "end marker" in decoded.error
    assert "\n" not in decoded.error


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_progressive_jpeg_that_lacks_scans_is_truncated(share):
    assert decode_image(cut(jpeg(progressive=True), share)).status == "truncated"


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_jpeg_on_its_side_that_lacks_data_is_truncated(orientation):
    assert decode_image(cut(with_exif(exif(orientation)), 0.5)).status == "truncated"


def test_jpeg_cut_at_a_restart_marker_is_truncated():
    image_bytes = jpeg(restart_marker_rows=1)
    at = image_bytes.index(b"\xff\xd3", image_bytes.index(b"\xff\xda"))
    assert decode_image(image_bytes[:at] + EOI).status == "truncated"


def test_a_trailer_after_the_early_end_does_not_hide_it():
    half = cut(jpeg(), 0.5)
    assert decode_image(half + b"trailer").status == "truncated"
    assert decode_image(half + jpeg()).status == "truncated"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tail", [b"", b"trailer", EOI, b"\xff\xff", jpeg()], ids=["none", "text", "EOI", "fill", "JPEG"]
)
def test_whole_jpeg_is_ok_whatever_follows_it(kind, tail):
    image_bytes = jpeg(**KINDS[kind])
    decoded = decode_image(image_bytes + tail)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(image_bytes))


@pytest.mark.parametrize("kind", [*KINDS, "progressive"])
@pytest.mark.parametrize("level", [127, 128, 129])
def test_whole_gray_page_is_ok(kind, level):
    options = {"progressive": True} if kind == "progressive" else KINDS[kind]
    image_bytes = jpeg(image=np.full((98, 130, 3), level, np.uint8), **options)
    decoded = decode_image(image_bytes)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(image_bytes))


def test_whole_photograph_with_a_gray_lower_half_is_ok():
    image = photo()
    image[49:] = 128
    for options in ({}, {"progressive": True}, {"mode": "L"}, {"restart_marker_rows": 1}):
        assert decode_image(jpeg(image=image, **options)).status == "ok"


def test_fill_bytes_before_the_end_marker_are_allowed():
    image = np.full((98, 130, 3), 128, np.uint8)
    image_bytes = jpeg(image=image)
    assert decode_image(image_bytes[:-2] + b"\xff\xff" + EOI).status == "ok"
    assert decode_image(cut(jpeg(), 0.5)[:-2] + b"\xff\xff" + EOI).status == "truncated"


# Orientation


def exif(orientation, order="<", kind=3):
    code = {1: "B", 3: "H", 4: "I"}[kind]
    value = struct.pack(f"{order}{code}", orientation).ljust(4, b"\0")
    entries = struct.pack(f"{order}HHI4s", 0x0100, 4, 1, b"\0\0\0\1") + struct.pack(f"{order}HHI", 0x0112, kind, 1)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + magic + struct.pack(f"{order}IH", 8, 2) + entries + value + bytes(4)


def segment(marker, content):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


XMP = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="1"/>')
COMMENT = segment(0xFE, b"Exif\0\0 is no EXIF here")


def with_exif(content, before=b"", after=b"", mode="RGB"):
    image_bytes = jpeg(mode)
    return image_bytes[:2] + before + segment(0xE1, content) + after + image_bytes[2:]


def assert_upright(image_bytes, orientation, mode="RGB"):
    decoded = decode_image(image_bytes)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, UPRIGHT[orientation](pixels(jpeg(mode))))
    assert (decoded.width, decoded.height) == (130, 98)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_every_integer_type_is_applied(orientation, kind, order, mode):
    assert_upright(with_exif(exif(orientation, order, kind), mode=mode), orientation, mode)


@pytest.mark.parametrize(("before", "after"), [(XMP, b""), (XMP + XMP, b""), (COMMENT, XMP), (XMP + COMMENT, XMP)])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_is_applied_whatever_the_order_of_segments(orientation, mode, before, after):
    assert_upright(with_exif(exif(orientation), before, after, mode=mode), orientation, mode)


def test_the_first_exif_segment_is_used():
    assert_upright(with_exif(exif(6), after=segment(0xE1, exif(3))), 6)
    assert_upright(with_exif(exif(1), XMP, after=segment(0xE1, exif(3))), 1)


def test_exif_after_the_frame_header_is_used():
    image_bytes = jpeg()
    at = image_bytes.index(b"\xff\xda")
    assert_upright(image_bytes[:at] + segment(0xE1, exif(6)) + image_bytes[at:], 6)


@pytest.mark.parametrize("value", [0, 9, 255])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_orientation_out_of_range_is_ignored(kind, value):
    assert_upright(with_exif(exif(value, ">", kind)), 1)


def test_error_of_a_rotated_jpeg_counts_its_own_bytes():
    image_bytes = with_exif(exif(6))[:3000]
    assert decode_image(image_bytes).error == "JPEG ends early, after 3000 bytes: Image is incomplete or truncated"


# What is not decoded


def with_frame(marker=0xC0, bits=8):
    image_bytes = bytearray(jpeg())
    at = image_bytes.index(b"\xff\xc0")
    image_bytes[at + 1], image_bytes[at + 4] = marker, bits
    return bytes(image_bytes)


@pytest.mark.parametrize(
    ("image_bytes", "error"),
    [
        (with_frame(0xC1, 12), "12-bit JPEG is not supported"),
        (with_frame(0xC2, 12), "12-bit JPEG is not supported"),
        (with_frame(0xC3, 16), "16-bit JPEG is not supported"),
        (with_frame(0xC5), "hierarchical JPEG is not supported"),
        (with_frame(0xF7), "JPEG-LS is not supported"),
    ],
)
def test_jpeg_of_a_kind_that_no_decoder_reads_is_unsupported(image_bytes, error):
    decoded = decode_image(image_bytes)
    assert (decoded.status, decoded.image, decoded.error) == ("unsupported", None, error)
    assert (decoded.width, decoded.height) == (130, 98)
