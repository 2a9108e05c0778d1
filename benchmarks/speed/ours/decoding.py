"""Our decoding and preprocessing, on one core."""

from benchmarks.speed.protocol import decode_all
from catsdogs.images import Preprocessing, decode_image

PREPROCESSING = Preprocessing()


def decode_for_model(image_bytes: bytes) -> object:
    """Decode a file to the pixels that the model takes."""
    image = decode_image(image_bytes).image
    assert image is not None
    return PREPROCESSING(image)


if __name__ == "__main__":
    decode_all(decode_for_model)
