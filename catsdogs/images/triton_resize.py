"""Resize, crop and flip a batch of images of any sizes with one kernel on a GPU.

`tensors.resize_one_by_one` does the same with about four kernels an image. Python, which all threads of a
process share, takes longer for them than the GPU. The two differ by at most one level of 255.

Bilinear with antialias as in torch: the weight of an input pixel is a triangle around the centre of the output pixel,
as wide as two input pixels, or two output pixels if the image shrinks (aten/src/ATen/native/cuda/UpSample.cuh).

N images, H height, W width.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from catsdogs.images.tensors import Resize, to_device

BLOCK = 64  # output pixels of a row that a program computes


@triton.jit
def _find_taps(output: tl.tensor, scale: tl.tensor, side: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the first input pixel of output pixels, the end of their input pixels, and their centres."""
    support = tl.maximum(scale, 1.0)
    centre = scale * (output + 0.5)
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    return first, tl.minimum((centre + support + 0.5).to(tl.int32), side), centre


@triton.jit
def _compute_weight(pixel: tl.tensor, centre: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return tl.maximum(1.0 - tl.abs(pixel - centre + 0.5) / tl.maximum(scale, 1.0), 0.0)


@triton.jit
def resize_kernel(geometry: tl.tensor, views: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> None:
    """Compute `block` pixels of one row of one view; `geometry` has the numbers of `_list_numbers` for each image."""
    n, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    numbers = geometry + n * 11  # numbers an image
    image = tl.load(numbers).to(tl.pointer_type(tl.uint8))
    channel_step, row_step, column_step = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    height, width = tl.load(numbers + 4).to(tl.int32), tl.load(numbers + 5).to(tl.int32)
    scale_y, scale_x = height * 1.0 / tl.load(numbers + 6), width * 1.0 / tl.load(numbers + 7)
    top, left = tl.load(numbers + 8).to(tl.int32), tl.load(numbers + 9).to(tl.int32)
    columns = tile * block + tl.arange(0, block)
    first_y, end_y, centre_y = _find_taps(row + top, scale_y, height)
    first_x, end_x, centre_x = _find_taps(columns + left, scale_x, width)
    red = tl.zeros((block,), tl.float32)
    green = tl.zeros((block,), tl.float32)
    blue = tl.zeros((block,), tl.float32)
    total = tl.zeros((block,), tl.float32)
    for y in range(first_y, end_y):
        weight_y = _compute_weight(y, centre_y, scale_y)
        for tap in range(tl.max(end_x - first_x)):
            x = first_x + tap
            is_inside = x < end_x
            weight = tl.where(is_inside, weight_y * _compute_weight(x, centre_x, scale_x), 0.0)
            pixels = image + y * row_step + x * column_step  # 64 bits: an image may have more than 2**31 bytes
            red += weight * tl.load(pixels, is_inside, 0)
            green += weight * tl.load(pixels + channel_step, is_inside, 0)
            blue += weight * tl.load(pixels + 2 * channel_step, is_inside, 0)
            total += weight
    is_flipped = tl.load(numbers + 10) != 0
    view = views + ((n * size + row).to(tl.int64) * size + tl.where(is_flipped, size - 1 - columns, columns)) * 3
    is_output = columns < size
    tl.store(view, (red / total + 0.5).to(tl.uint8), is_output)
    tl.store(view + 1, (green / total + 0.5).to(tl.uint8), is_output)
    tl.store(view + 2, (blue / total + 0.5).to(tl.uint8), is_output)


def resize_batch(resizes: Sequence[Resize], size: int) -> torch.Tensor:
    """Resize uint8 (3, H, W) tensors of any sizes and strides on their device, uint8 (N, size, size, 3)."""
    device = resizes[0].image_CHW.device
    numbers = np.array([_list_numbers(resize) for resize in resizes], dtype=np.int64)
    views_NHWC = torch.empty((len(resizes), size, size, 3), dtype=torch.uint8, device=device)
    grid = (len(resizes), size, -(-size // BLOCK))
    resize_kernel[grid](
        to_device(numbers, device), views_NHWC, size, BLOCK, num_warps=BLOCK // 32, enable_fp_fusion=True
    )
    return views_NHWC


def _list_numbers(resize: Resize) -> list[int]:
    """List an image's address, strides in bytes and sides, then its sides when resized, the corner, and the flip."""
    image_CHW, sides, top, left, flipped = resize
    return [image_CHW.data_ptr(), *image_CHW.stride(), *image_CHW.shape[1:], *sides, top, left, flipped]
