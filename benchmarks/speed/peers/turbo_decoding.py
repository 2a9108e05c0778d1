"""libjpeg-turbo (simplejpeg) and torch's antialiased bilinear resize, on one core: a file has to be a JPEG."""

import simplejpeg
import torch
import torch.nn.functional as F

from benchmarks.speed.protocol import decode_all

SHORT_SIDE, SIZE = 232, 224


def decode_for_model(image_bytes: bytes) -> torch.Tensor:
    """Decode to RGB, resize the short side, crop the centre; uint8 (H, W, C)."""
    image_HWC = torch.from_numpy(simplejpeg.decode_jpeg(image_bytes, colorspace="RGB"))
    height, width = image_HWC.shape[:2]
    sides = [side * SHORT_SIDE // min(height, width) for side in (height, width)]
    resized_1CHW = F.interpolate(image_HWC[None].permute(0, 3, 1, 2), sides, mode="bilinear", antialias=True)
    top, left = (round((side - SIZE) / 2) for side in sides)
    return resized_1CHW[0, :, top : top + SIZE, left : left + SIZE].permute(1, 2, 0).contiguous()


if __name__ == "__main__":
    decode_all(decode_for_model)
