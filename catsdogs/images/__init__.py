"""Decode image files to pixels, or to the reason why not; preprocess and augment them.

An image is a NumPy array, uint8 (H, W, 3), RGB. Only `augment`, `tensors` and `torch_decoders` import torch. The other
modules import these three inside functions, because the driver (the process that runs the command) needs no torch.
"""

from catsdogs.images.decode import MAX_PIXELS, Decoded, decode_image, read_gpu_decodable_size
from catsdogs.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImageArray, Preprocessing

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "Decoded",
    "ImageArray",
    "Preprocessing",
    "decode_image",
    "read_gpu_decodable_size",
]
