"""Bytes to uint8 RGB pixels or a reason why not; preprocessing and augmentation. No Ray.

Between stages an image is a NumPy array, uint8 (H, W, 3), RGB. torch is imported by `augment` and `tensors` alone.
"""

from catsdogs.images.decode import MAX_PIXELS, Decoded, decode, read_gpu_decodable_size
from catsdogs.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImageArray, Preprocessing

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "Decoded",
    "ImageArray",
    "Preprocessing",
    "decode",
    "read_gpu_decodable_size",
]
