"""Our decoding and preprocessing, on one core."""

from benchmarks.speed.peers.common import decode_all
from catsdogs.images import Preprocessing, decode

PREPROCESSING = Preprocessing()


def view(content: bytes) -> object:
    """Decode to the model's view."""
    image = decode(content).image
    assert image is not None
    return PREPROCESSING(image)


if __name__ == "__main__":
    decode_all(view)
