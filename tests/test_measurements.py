"""What is measured of an image, compared with ImageHash, and with cleanvision's formulas written plainly."""

import io

import imagehash
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageFilter, ImageStat
from spots import draw_spots

from catsdogs.auditing.issues import MIN_SHARPNESS
from catsdogs.images.header import read_header
from catsdogs.images.measurements import measure_image

SIZES = [(1, 1), (1, 300), (31, 33), (64, 64), (200, 33), (375, 500), (700, 900), (1100, 1500)]


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_hash_is_that_of_imagehash(size):
    for seed in range(20 if size[0] < 300 else 3):
        image = draw_spots(*size, seed=seed)
        expected = int(str(imagehash.phash(Image.fromarray(image))), 16)
        assert measure_image(image).phash == expected


def test_of_a_huge_image_every_second_pixel_is_measured():
    small = draw_spots(300, 400)
    image = small.repeat(20, axis=0).repeat(20, axis=1)
    assert measure_image(image) == measure_image(image[::2, ::2])


@pytest.mark.parametrize("level", [0, 3, 128, 255])
def test_an_image_of_one_color_has_no_hash(level):
    image = np.full((240, 320, 3), level, np.uint8)
    noise = np.random.default_rng(level).integers(0, 3, image.shape, dtype=np.uint8)
    for blank in (image, np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)):
        assert measure_image(blank).phash is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_brightness_and_entropy_are_those_of_cleanvision(size, scale):
    image = (draw_spots(*size) * scale).astype(np.uint8)
    red, green, blue = (image[..., i].astype(float) for i in range(3))
    brightness = np.sqrt(0.241 * red**2 + 0.691 * green**2 + 0.068 * blue**2) / 255
    p5, p99 = np.percentile(brightness, [5, 99])
    mean_C = ImageStat.Stat(Image.fromarray(image)).mean
    measured = measure_image(image)
    assert measured.brightness_p5 == pytest.approx(p5, abs=0.01)
    assert measured.brightness_p99 == pytest.approx(p99, abs=0.01)
    expected = np.sqrt(0.241 * mean_C[0] ** 2 + 0.691 * mean_C[1] ** 2 + 0.068 * mean_C[2] ** 2) / 255
    assert measured.brightness == pytest.approx(expected, abs=1e-6)
    assert measured.entropy == pytest.approx(Image.fromarray(image).entropy())
    assert measured.contrast == pytest.approx(np.std(np.asarray(Image.fromarray(image).convert("L"))) / 255, abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 2), (200, 33), (375, 500), (1500, 2000)])
def test_sharpness_is_the_deviation_of_the_laplacian(size):
    image = Image.fromarray(draw_spots(*size)).convert("L")
    image.thumbnail((256, 256), Image.Resampling.BILINEAR)
    kernel = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    expected = scipy.ndimage.convolve(np.asarray(image).astype(float), kernel, mode="nearest").std()
    assert measure_image(draw_spots(*size)).sharpness == pytest.approx(expected, rel=0.05)


def test_a_blurred_image_is_less_sharp_at_any_size():
    for scale in (1, 4):
        image = Image.fromarray(draw_spots(375, 500)).resize((500 * scale, 375 * scale))
        blurred = image.filter(ImageFilter.GaussianBlur(6 * scale))
        sharp, soft = (measure_image(np.asarray(found)).sharpness for found in (image, blurred))
        assert soft < MIN_SHARPNESS < sharp


def build_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


IMAGE = Image.fromarray(draw_spots(40, 60))
FRAMES = {"save_all": True, "append_images": [IMAGE.rotate(90, expand=False), IMAGE.rotate(180)]}
HEADERS = {
    "JPEG": (encode(IMAGE, "JPEG"), ("RGB", None, 1)),
    "rotated JPEG": (encode(IMAGE, "JPEG", exif=build_exif(6)), ("RGB", 6, 1)),
    "JPEG of no orientation": (encode(IMAGE, "JPEG", exif=build_exif(9)), ("RGB", None, 1)),
    "gray JPEG": (encode(IMAGE.convert("L"), "JPEG"), ("L", None, 1)),
    "CMYK JPEG": (encode(IMAGE.convert("CMYK"), "JPEG"), ("CMYK", None, 1)),
    "PNG": (encode(IMAGE.convert("RGBA"), "PNG"), ("RGBA", None, 1)),
    "rotated PNG": (encode(IMAGE, "PNG", exif=build_exif(3)), ("RGB", 3, 1)),
    "palette": (encode(IMAGE.convert("P"), "PNG"), ("P", None, 1)),
    "GIF": (encode(IMAGE, "GIF", **FRAMES), ("P", None, 3)),
    "WebP": (encode(IMAGE, "WEBP", **FRAMES), ("RGB", None, 3)),
    "rotated TIFF": (encode(IMAGE, "TIFF", exif=build_exif(8), **FRAMES), ("RGB", 8, 3)),
    "BMP": (encode(IMAGE, "BMP"), ("RGB", None, 1)),
    "no image": (b"text", (None, None, None)),
    "damaged PNG": (encode(IMAGE, "PNG")[:20], (None, None, None)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_header_has_mode_orientation_and_frames(name):
    content, expected = HEADERS[name]
    assert read_header(content) == expected
