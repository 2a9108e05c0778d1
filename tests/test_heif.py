"""AVIF and HEIC: recognized by their boxes, AVIF decoded by Pillow, HEIC by torchcodec where libheif is installed."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from torchcodec import decoders

from catsdogs.images import decode_image
from catsdogs.images.formats import sniff
from catsdogs.images.torch_decoders import decode_heic
from catsdogs.schema import STATUSES

# Drawn by `gradient`, transparent on the left, EXIF orientation 6, with pillow-heif, quality 30.
HEIC = base64.b64decode("""
AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAoVtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAAEZpbG9jAA
AAAERAAAMAAQAAAAACqQABAAAAAAAAAF4AAgAAAAADBwABAAAAAAAAABkAAwAAAAADIAABAAAAAAAAACQAAABNaWluZgAAAAAAAwAAABVpbmZl
AgAAAAABAABodmMxAAAAABVpbmZlAgAAAAACAABodmMxAAAAABVpbmZlAgAAAQADAABFeGlmAAAAAA5waXRtAAAAAAABAAABj2lwcnAAAAFnaX
BjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAA
AwAeoDCBBZbqSSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHBcrAiQAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABgAAAAQAAAAB
BwaXhpAAAAAAMICAgAAAAJaXJvdAMAAAByaHZjQwEECAAAAJ/4AAAAAB7wAPz8+PgAAA8DYAABABdAAQwB//8ECAAAAwCf+AAAAwAAHroCQGEA
AQAmQgEBBAgAAAMAn/gAAAMAAB7AwgQWW6kkprmwIAAAAwMgAAADACFiAAEAB0QBwXKwIkAAAAAOcGl4aQAAAAABCAAAACdhdXhDAAAAAHVybj
ptcGVnOmhldmM6MjAxNTphdXhpZDoxAAAAACBpcG1hAAAAAAAAAAIAAQWBAgMEhQACBYYDB4iFAAAAKGlyZWYAAAAAAAAADmF1eGwAAgABAAEA
AAAOY2RzYwADAAEAAQAAAKNtZGF0AAAAWigBrxmA94D5+kn78X6n268e4Yd2ZbPij4ac6R0skboMNF9PKinTFBXnNEW4SY4IOLDf8yn8PaNwLV
doJqsEkCuXt0Oh27lYucYbphcfbnbkakgDDi2TwYioyQAAABUoAa4z4rDg//+jqDnYX7R9+d00jFgAAAAGRXhpZgAATU0AKgAAAAgAAQESAAMA
AAABAAYAAAAAAAA=
""")


def gradient(height=64, width=96):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=2).astype(np.uint8)


def encode_avif(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "AVIF", quality=95, **options)
    return file.getvalue()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def ftyp(*brands):
    content = brands[0] + bytes(4) + b"".join(brands[1:])
    return (8 + len(content)).to_bytes(4) + b"ftyp" + content


def assert_near(image, expected, tolerance=12):
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= tolerance


def has_libheif():
    try:
        decode_heic(HEIC)
    except ImportError:
        return False
    return True


needs_libheif = pytest.mark.skipif(not has_libheif(), reason="libheif is not installed")


@pytest.mark.parametrize(
    ("brands", "expected"),
    [
        ((b"avif", b"mif1", b"miaf"), "AVIF"),
        ((b"mif1", b"miaf", b"avif"), "AVIF"),
        ((b"avis",), "AVIF"),
        ((b"heic", b"mif1"), "HEIC"),
        ((b"mif1",), "HEIC"),
        ((b"msf1", b"hevc"), "HEIC"),
        ((b"isom", b"mp42"), None),
        ((b"qt  ",), None),
        ((b"crx ",), None),
    ],
)
def test_format_follows_from_the_brands(brands, expected):
    assert sniff(ftyp(*brands) + bytes(40)) == expected


def test_version_of_the_brands_is_no_brand():
    assert sniff((16).to_bytes(4) + b"ftypisom" + b"avif") is None


def test_avif_is_decoded():
    decoded = decode_image(encode_avif(gradient()))
    assert (decoded.status, decoded.error, decoded.width, decoded.height) == ("ok", None, 96, 64)
    assert_near(decoded.image, gradient())


def test_alpha_of_avif_is_composited_over_white():
    alpha = np.where(np.arange(96) < 48, 0, 255).astype(np.uint8)
    decoded = decode_image(encode_avif(np.dstack([gradient(), np.tile(alpha, (64, 1))])))
    assert_near(decoded.image[:, :40], np.full((64, 40, 3), 255))
    assert_near(decoded.image[:, 56:], gradient()[:, 56:])


@pytest.mark.parametrize(("orientation", "rotated"), [(6, -1), (8, 1), (3, 2)])
def test_orientation_of_avif_is_applied_and_the_stored_size_reported(orientation, rotated):
    decoded = decode_image(encode_avif(gradient(), exif=with_orientation(orientation)))
    assert_near(decoded.image, np.rot90(gradient(), rotated))
    assert (decoded.width, decoded.height) == (96, 64)


def test_first_frame_of_an_avif_sequence_is_the_image():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "AVIF", save_all=True, append_images=frames[1:], quality=95)
    assert_near(decode_image(file.getvalue()).image, np.array(frames[0]))


@needs_libheif
def test_heic_is_decoded_upright_over_white():
    decoded = decode_image(HEIC)
    assert (decoded.status, decoded.error, decoded.width, decoded.height) == ("ok", None, 96, 64)
    expected = gradient()
    expected[:, :48] = 255
    assert_near(decoded.image, np.rot90(expected, -1), tolerance=40)
    assert np.abs(decoded.image.astype(int) - np.rot90(expected, -1)).mean() < 3


def test_heic_without_libheif_is_unsupported_and_says_what_is_missing(monkeypatch):
    def fail(*_, **__):
        raise ImportError("libheif.so.1")

    monkeypatch.setattr(decoders, "decode_heic", fail)
    decoded = decode_image(HEIC)
    assert (decoded.status, decoded.image, decoded.width, decoded.height) == ("unsupported", None, 96, 64)
    assert "HEIC needs libheif" in decoded.error


def test_heic_that_libheif_cannot_decode_is_unsupported(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("decode_heic, /a/DecodeHeic.cpp:88, heif_decode_image failed: Unsupported feature: No codec")

    monkeypatch.setattr(decoders, "decode_heic", fail)
    decoded = decode_image(HEIC)
    assert decoded.status == "unsupported"
    assert decoded.error.endswith(": heif_decode_image failed: Unsupported feature: No codec")


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 432000000 bytes",
        'torch_call_dispatcher( "aten::empty", "memory_format", stack.data(), TORCH_ABI_VERSION) API call failed',
    ],
)
def test_missing_memory_for_torchcodec_is_not_the_fault_of_the_file(message, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(decoders, "decode_heic", fail)
    with pytest.raises(MemoryError):
        decode_image(HEIC)


@pytest.mark.parametrize("error", [NotImplementedError("no such operator"), RecursionError("too deep")])
def test_an_error_of_torch_that_is_no_refusal_is_raised(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(decoders, "decode_heic", fail)
    with pytest.raises(type(error)):
        decode_image(HEIC)


def test_orientation_in_xmp_alone_is_ignored():
    image_bytes = encode_avif(gradient(), xmp=b'<x tiff:Orientation="6"/>')
    assert_near(decode_image(image_bytes).image, gradient())


@pytest.mark.parametrize("image_bytes", [encode_avif(gradient()), HEIC], ids=["AVIF", "HEIC"])
def test_limit_is_judged_from_the_boxes(image_bytes):
    header = image_bytes[: image_bytes.index(b"mdat")]
    decoded = decode_image(header, max_pixels=96 * 64 - 1)
    assert (decoded.status, decoded.width, decoded.height) == ("too_large", 96, 64)
    assert decode_image(image_bytes, max_pixels=96 * 64).status != "too_large"


@pytest.mark.parametrize("image_bytes", [encode_avif(gradient()), HEIC], ids=["AVIF", "HEIC"])
def test_cut_anywhere_is_truncated(image_bytes):
    if image_bytes is HEIC and not has_libheif():
        pytest.skip("libheif is not installed")
    for cut in range(32, len(image_bytes), 7):
        decoded = decode_image(image_bytes[:cut])
        assert (cut, decoded.status) == (cut, "truncated")


@pytest.mark.parametrize("image_bytes", [encode_avif(gradient()), HEIC], ids=["AVIF", "HEIC"])
def test_flipped_bytes_give_an_image_or_a_status(image_bytes):
    rng = np.random.default_rng(0)
    for _ in range(200):
        mutant = bytearray(image_bytes)
        for position in rng.integers(12, len(mutant), 2):
            mutant[position] ^= int(rng.integers(1, 256))
        decoded = decode_image(bytes(mutant), max_pixels=1_000_000)
        assert decoded.status in STATUSES
        assert (decoded.image is None) == (decoded.status != "ok")


@pytest.mark.parametrize("brand", [b"avif", b"heic"])
def test_boxes_without_an_image_are_no_image(brand):
    decoded = decode_image(ftyp(brand) + bytes(40))
    assert (decoded.status, decoded.image) == ("truncated", None)
    damaged = decode_image(ftyp(brand) + b"\0\0\0\x02meta" + bytes(40))
    assert (damaged.status, damaged.image) == ("decode_error", None)
