"""JPEG files whose data end early in spite of an end marker, whose EXIF data are unusual, or that no decoder reads."""

import base64
import io
import struct

import numpy as np
import pytest
from conftest import UPRIGHT
from PIL import Image

from catsdogs.images import decode_image, read_gpu_decodable_size

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
    assert "lacks pixel data" in decoded.error
    assert "\n" not in decoded.error


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_progressive_jpeg_that_lacks_data_is_truncated(share):
    assert decode_image(cut(jpeg(progressive=True), share)).status == "truncated"


def test_jpeg_without_the_scan_of_a_channel_is_truncated():
    image_bytes = one_scan_per_channel()
    assert decode_image(image_bytes[: image_bytes.rindex(b"\xff\xda")] + EOI).status == "truncated"


def test_progressive_jpeg_without_its_last_refinement_is_ok():
    image_bytes = jpeg(progressive=True)
    start = image_bytes.rindex(b"\xff\xc4")
    assert b"\xff\xda" in image_bytes[start:]
    image_bytes = image_bytes[:start] + EOI
    decoded = decode_image(image_bytes)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(image_bytes))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_jpeg_on_its_side_that_lacks_data_is_truncated(orientation):
    assert decode_image(cut(with_exif(exif(orientation)), 0.5)).status == "truncated"


def test_jpeg_cut_at_a_restart_marker_is_truncated():
    image_bytes = jpeg(restart_marker_rows=1)
    at = image_bytes.index(b"\xff\xd3", image_bytes.index(b"\xff\xda"))
    assert decode_image(image_bytes[:at] + EOI).status == "truncated"


def test_jpeg_with_a_hole_between_restart_markers_is_refused():
    image_bytes = jpeg(restart_marker_rows=1)
    start = image_bytes.index(b"\xff\xd1", image_bytes.index(b"\xff\xda"))
    end = image_bytes.index(b"\xff\xd2", start)
    assert decode_image(image_bytes[: start + 42].rstrip(b"\xff") + image_bytes[end:]).status == "truncated"
    without_two = image_bytes[:start] + image_bytes[image_bytes.index(b"\xff\xd3", end) :]
    assert decode_image(without_two).error == "cannot decode JPEG: found marker 0xd3 instead of RST1"


@pytest.mark.parametrize("width", [113, 114, 128])
@pytest.mark.parametrize("num_missing", [8, 60])
def test_jpeg_that_lacks_its_last_bytes_is_truncated(width, num_missing):
    image_bytes = jpeg(image=photo(width=width), subsampling=2)
    assert decode_image(image_bytes[: -2 - num_missing].rstrip(b"\xff") + EOI).status == "truncated"


def one_scan_per_channel():
    """Join three gray JPEGs of one quality to a file with three scans, Y, Cb and Cr."""
    channels = [jpeg("L", quality=90, image=photo(seed=seed)) for seed in range(3)]
    scans = [channel[channel.index(b"\xff\xda") : -2] for channel in channels]
    headers = channels[0][: channels[0].index(b"\xff\xda")]
    frame = headers.index(b"\xff\xc0")
    components = b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    headers = (
        headers[:frame]
        + b"\xff\xc0\0\x11"
        + headers[frame + 4 : frame + 9]
        + b"\3"
        + components
        + headers[frame + 13 :]
    )
    return headers + b"".join(scan[:5] + bytes([i]) + scan[6:] for i, scan in enumerate(scans, 1)) + EOI


def test_jpeg_cut_in_the_scan_of_its_last_channel_is_truncated():
    image_bytes = one_scan_per_channel()
    decoded = decode_image(image_bytes)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(image_bytes))
    last = image_bytes.rindex(b"\xff\xda")
    for share in (0.1, 0.5, 0.9):
        end = last + 12 + int(share * (len(image_bytes) - last))
        assert decode_image(image_bytes[:end].rstrip(b"\xff") + EOI).status == "truncated"


# 64 x 48 pixels of noisy gradients, by `cjpeg -arithmetic -quality 50`, the second also with `-progressive`.
ARITHMETIC = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2
P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/yQARCAAwAEADASIAAhEBAxEB
/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AHhpN1nNYDz3JQjYa98pp4e6MU6eLrPiRQiFZy7XAoWTvOPq1bkuyGat2kY7gLxKI7zxo/MBR9dN60L9Ub
R6EO5oWSkmYrTnf2XpLM844KadOxJIq6cZnCmPB+xNE8Z2LBnwZOerbG05cMAhk4lwScgSBFm9owiy0Qb3ebAOQz4ZOBiUI+sy5UWRcV/06nyPBqhbZXEd
e0XVxj0LuDSbD8o9yTzPMrDvggwxcxcvSJUrDC6k6HiA53fdTcz7dG+tFoKtl0jHQAgiqadpflwwFneBWAnGHsj8nh72I9XyMH6QZFRBKzz3PoWWac8+E2
fKg91b5/nNRT05NlQg6J7eshuLskZVQ79zGuo9EFd6ULgF1VkXPGFosQ94TI9OdspkVmkolWarnWa6kjTwzFbO7De0vY3M0cR38wEp/wA/wCt0RZ2zxvIR
d+ZCb6hJiZMuJK3WwlTwTLw4M5mA/9k=
""")
ARITHMETIC_PROGRESSIVE = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2
P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/ygARCAAwAEADASIAAhEBAxEB
/8wABgAQARD/2gAMAwEAAhADEAAAAf7wfr6aFrUREIEQpGa+h7YACdYpfhAPDihG6jfYrU3ct92ayA/N8Gz/zAAEEAX/2gAIAQEAAQUCmTINe2kHQl8Uni
D5aPHF9P/MAAQRBf/aAAgBAwEBPwEQZYO/2f8AEf4TqLHQ/8wABBEF/9oACAECAQE/AUqbZTvNEWNg4P/MAAQQBf/aAAgBAQAGPwKo/8wABBAF/9oACAEB
AAE/IYyDtcYgatdtAS3L+oODar/g4/yaJ9+pXdu5cPt06UFSJJeTXeakr8XVDWqUFSvD5uCXfn5eQP/aAAwDAQACAAMAAAAQTv61KVZS43zu/8wABBEF/9
oACAEDAQE/EPQwkRL/zAAEEQX/2gAIAQIBAT8QGZwU5UD/zAAEEAX/2gAIAQEAAT8Q2byMklQzWC/wzkx3YduDasNswOZhSk+tVACBOpDoIr3xpZV3kEby
PYxppswLCzLEGC4ENYTRTVVd3MGi3sft+UlGJX0ybpTqZvS3hJOSFD5O/wCYba8tvTB4GwQlIfg36TQrDUdXJNxfq+tpnWV0hOg5KqV6iTfGjuFe815nSw
fgGRrtBI45nUBfKtwbdzRqb2RVSD+nNR/PG+jli236RRqgN81QppZu9fpvKg9ohHBCqrCLlMhtnldVgnz8zpqSx158PKoiXJZcYo7y/9k=
""")


@pytest.mark.parametrize("image_bytes", [ARITHMETIC, ARITHMETIC_PROGRESSIVE], ids=["sequential", "progressive"])
def test_arithmetic_jpeg_that_lacks_data_is_truncated(image_bytes):
    decoded = decode_image(image_bytes)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(image_bytes))
    start = image_bytes.index(b"\xff\xda") + 14
    for share in (0.5, 0.65, 0.8):
        end = start + int(share * (len(image_bytes) - start))
        assert decode_image(image_bytes[:end].rstrip(b"\xff") + EOI).status == "truncated"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_whose_second_half_is_zeros_is_truncated(mode):
    image_bytes = jpeg(mode)
    half = image_bytes[: len(image_bytes) // 2]
    zeros = half + bytes(len(image_bytes) - len(half) - 2) + EOI
    assert decode_image(zeros).status == "truncated"
    assert read_gpu_decodable_size(zeros, 10**9) is None


@pytest.mark.parametrize("kind", [*KINDS, "progressive"])
@pytest.mark.parametrize("extra", [bytes(3), bytes(200), b"\x55" * 200], ids=["3 zeros", "200 zeros", "200 bytes"])
def test_superfluous_bytes_before_the_end_marker_are_ignored(kind, extra):
    image_bytes = jpeg(progressive=True) if kind == "progressive" else jpeg(**KINDS[kind])
    decoded = decode_image(image_bytes[:-2] + extra + EOI)
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(image_bytes))


def test_jfif_of_an_unknown_version_is_decoded():
    image_bytes = bytearray(jpeg())
    at = image_bytes.index(b"JFIF\0")
    image_bytes[at + 5] = 0
    np.testing.assert_array_equal(decode_image(bytes(image_bytes)).image, pixels(jpeg()))


def test_jpeg_of_an_unusual_subsampling_is_decoded():
    image_bytes = bytearray(jpeg(image=photo(24, 8), keep_rgb=True))
    image_bytes[image_bytes.index(b"\xff\xc0") + 11] = 0x31
    decoded = decode_image(bytes(image_bytes))
    assert decoded.status == "ok"
    np.testing.assert_array_equal(decoded.image, pixels(bytes(image_bytes)))


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
    assert decode_image(image_bytes).error == "JPEG ends early, after 3000 bytes: Premature end of JPEG file"


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("before", [b"", exif(6)[:6] + b"II*\0\x08\0\0\0" + bytes(6)], ids=["XMP", "XMP and EXIF"])
def test_orientation_in_xmp_alone_is_ignored(before, mode):
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')
    image_bytes = with_exif(before, after=xmp, mode=mode) if before else jpeg(mode)[:2] + xmp + jpeg(mode)[2:]
    assert_upright(image_bytes, 1, mode)


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
