"""Images as torch tensors: resizing, cropping, normalizing, copying to a device and waiting for it.

N batch, C channels, H height, W width.
"""

import contextlib
import functools
import logging
import queue
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from catsdogs.images.preprocess import ImageArray

logger = logging.getLogger(__name__)


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array, which may be read-only; to a GPU through pinned memory and asynchronously."""
    if device.type != "cuda":
        return torch.tensor(array, device=device)
    pinned = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)


class DeviceStreams:
    """CUDA streams for threads that use a device at the same time, one each; on a CPU there are none.

    A stream is passed from call to call rather than kept by a thread: torch caches memory by stream.
    """

    def __init__(self, device: torch.device, num_threads: int) -> None:
        self._free: queue.SimpleQueue[torch.cuda.Stream | None] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._free.put(torch.cuda.Stream(device) if device.type == "cuda" else None)

    @contextlib.contextmanager
    def reserve(self) -> Iterator[None]:
        """Use a stream that no other thread uses; wait until one is free."""
        stream = self._free.get()
        try:
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                yield
        finally:
            self._free.put(stream)


def synchronize_stream(device: torch.device) -> None:
    """Wait until a GPU has done what this thread queued on its stream; the other streams continue."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def resize_and_crop(image: ImageArray, short_side: int, size: int) -> ImageArray:
    """Resize the short side of uint8 (H, W, 3) and crop the centre, uint8 (size, size, 3)."""
    # A (1, H, W, C) view: torch recognizes its permutation as channels_last, for which it has a faster kernel.
    image_1CHW = _to_writable(image)[None].permute(0, 3, 1, 2)
    _, sides, top, left, _ = crop_centre(image_1CHW[0], short_side, size)
    return to_image(_interpolate(image_1CHW, sides)[0, :, top : top + size, left : left + size])


class Resize(NamedTuple):
    """How an image becomes a view: it is resized to `sides`, and a square is cut out and perhaps flipped.

    Attributes:
        image_CHW: uint8, with any strides.
        sides: height and width of the whole image after resizing.
        top, left: corner of the square in the resized image.
    """

    image_CHW: torch.Tensor
    sides: tuple[int, int]
    top: int = 0
    left: int = 0
    flipped: bool = False


def crop_centre(image_CHW: torch.Tensor, short_side: int, size: int) -> Resize:
    """Resize the short side and crop the centre, as torchvision's Resize and CenterCrop do."""
    _, height, width = image_CHW.shape
    sides = compute_resized_sides(height, width, short_side)
    top, left = (round((side - size) / 2) for side in sides)
    return Resize(image_CHW, sides, top, left)


def resize_tensors(resizes: Sequence[Resize], size: int) -> torch.Tensor:
    """Resize tensors of any sizes on their device, uint8 (N, size, size, C).

    On a GPU with one kernel (`triton_resize.py`), where that works.
    """
    device = resizes[0].image_CHW.device
    if device.type == "cuda" and passes_trial(device, size):
        from catsdogs.images.triton_resize import resize_batch  # not at the top: CPUs do without triton

        return resize_batch(resizes, size)
    return resize_one_by_one(resizes, size)


def resize_one_by_one(resizes: Sequence[Resize], size: int) -> torch.Tensor:
    """Do the same with operators of torch, several for each image."""
    views_NCHW = torch.empty((len(resizes), 3, size, size), device=resizes[0].image_CHW.device)
    for resize, view_CHW in zip(resizes, views_NCHW, strict=True):
        resized_CHW = _interpolate(resize.image_CHW[None].float(), resize.sides)[0]
        square_CHW = resized_CHW[:, resize.top : resize.top + size, resize.left : resize.left + size]
        view_CHW.copy_(square_CHW.flip(2) if resize.flipped else square_CHW)
    return views_NCHW.round_().to(torch.uint8).permute(0, 2, 3, 1)


@functools.cache
def passes_trial(device: torch.device, size: int) -> bool:
    """Compare the kernel with torch's operators on one image; Triton needs a C compiler, and may not know the GPU."""
    generator = torch.Generator().manual_seed(0)
    image_HWC = torch.randint(0, 256, (61, 83, 3), dtype=torch.uint8, generator=generator).to(device)
    trial = crop_centre(image_HWC.permute(2, 0, 1)[:, 3:, 5:], size + size // 30, size)._replace(flipped=True)
    try:
        from catsdogs.images.triton_resize import resize_batch

        found, expected = (resize([trial], size).int() for resize in (resize_batch, resize_one_by_one))
        if bool((found - expected).abs().max() <= 1):
            return True
        logger.warning("the kernel that resizes images is inaccurate on %s; resizing them one by one", device)
    except Exception as error:
        logger.debug("trial of the resizing kernel failed", exc_info=True)
        logger.warning("Triton does not work on %s: %s; resizing images one by one, which is slower", device, error)
    return False


def compute_resized_sides(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Compute the height and width of an image whose short side is resized, as torchvision's Resize does."""
    short = min(height, width)
    return int(short_side * height / short), int(short_side * width / short)


def _interpolate(image_1CHW: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(image_1CHW, list(sides), mode="bilinear", antialias=True)


def resize_to_square(image: ImageArray, size: int) -> torch.Tensor:
    """Resize uint8 (H, W, 3) to (3, size, size) with the pixels of torchvision's `resize` with antialias."""
    image_1CHW = _to_writable(image)[None].permute(0, 3, 1, 2)
    return _interpolate(image_1CHW, (size, size))[0]


def normalize(
    images_NCHW: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Return (images / 255 - mean) / std as float32, on the tensor's device and in its memory format."""
    scale_C11, shift_C11 = _build_scale_and_shift(mean, std, images_NCHW.device)
    return images_NCHW.float().mul_(scale_C11).add_(shift_C11)


@functools.lru_cache(maxsize=16)
def _build_scale_and_shift(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the constants of `normalize` once per device: each copy would wait for all that is queued.

    They are computed on the CPU. The copy ends before this returns, so any stream can use them.
    """
    with torch.inference_mode(False):  # training uses them, too
        scale_C = torch.tensor(std).mul_(255).reciprocal_()
        shift_C = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
        return scale_C[:, None, None].to(device), shift_C[:, None, None].to(device)


def to_image(image_CHW: torch.Tensor) -> ImageArray:
    """Copy uint8 (3, H, W) to a contiguous (H, W, 3) that owns its memory."""
    return np.array(image_CHW.permute(1, 2, 0).numpy(), order="C")


def _to_writable(image: ImageArray) -> torch.Tensor:
    """View an array as a tensor; copy it only where torch cannot share it (read-only, flipped)."""
    return torch.from_numpy(np.require(image, np.uint8, ["C", "W"]))
