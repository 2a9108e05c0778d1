"""What takes torch: pixels to tensors and back, decoding JPEG, resizing, normalizing.

N batch, C channels, H, W.
"""

import numpy as np
import torch

from catsdogs.images.preprocess import Pixels
from catsdogs.vision import InterpolationMode, functional

_RGB = 3  # torchvision.io.ImageReadMode.RGB


def decode_jpeg(image_bytes: bytes) -> Pixels:
    """Decode to uint8 (H, W, 3), upright.

    Raises:
        RuntimeError: the file is damaged, or its pixels do not fit.
    """
    # Copies the compressed bytes, which torch wants writable. Not torchvision.io.decode_jpeg: it is the same
    # call behind a deprecation warning since torchvision 0.29.
    data = torch.frombuffer(bytearray(image_bytes), dtype=torch.uint8)
    image_CHW = torch.ops.image.decode_jpeg(data, _RGB, True)  # True: apply the EXIF orientation
    return np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy())


def resize_and_crop(image: Pixels, short_side: int, size: int) -> Pixels:
    """Resize the short side of uint8 (H, W, 3) and cut the centre out, uint8 (size, size, 3)."""
    image_CHW = functional.resize(to_tensor(image), [short_side], InterpolationMode.BILINEAR, antialias=True)
    return to_pixels(functional.center_crop(image_CHW, [size, size]))


def normalize(
    images_NCHW: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Return (images / 255 - mean) / std as float32, on the tensor's device and in its memory format."""
    scale_C = torch.tensor(std, device=images_NCHW.device).mul_(255).reciprocal_()
    shift_C = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images_NCHW.device)
    return images_NCHW.float().mul_(scale_C[:, None, None]).add_(shift_C[:, None, None])


def to_tensor(image: Pixels) -> torch.Tensor:
    """View uint8 (H, W, 3) as (3, H, W); a copy only where torch cannot share it (read-only, flipped)."""
    return torch.from_numpy(np.require(image, np.uint8, ["C", "W"])).permute(2, 0, 1)


def to_pixels(image_CHW: torch.Tensor) -> Pixels:
    """Copy uint8 (3, H, W) to a contiguous (H, W, 3) that owns its memory."""
    return np.array(image_CHW.permute(1, 2, 0).numpy(), order="C")
