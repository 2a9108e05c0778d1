"""Drawn pictures that differ from each other as photographs do: smooth spots of color with noise."""

import io

import numpy as np
from PIL import Image

from catsdogs.images import ImageArray


def draw_spots(height: int, width: int, seed: int = 0, noise: float = 8.0) -> ImageArray:
    """Draw spots, uint8 (height, width, 3); other seeds give other spots."""
    generator = np.random.default_rng(seed)
    spots = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = np.asarray(spots.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(image + generator.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def encode_jpeg(image: ImageArray | Image.Image, quality: int = 90) -> bytes:
    """Encode an image as JPEG."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def spots_jpeg(seed: int) -> bytes:
    """Draw and encode spots of 120 x 160 pixels."""
    return encode_jpeg(draw_spots(120, 160, seed))
