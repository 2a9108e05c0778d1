"""Training images that stay in the memory of a worker's device, so that a step neither reads nor decodes them.

    load_resident_images          once per worker group, on GPUs
      data.iter_full_size         decode on all CPUs; pixels to the device until they take their room
      data.iter_checked_jpegs     of the others, JPEGs stay encoded in the memory of the machine
    ResidentImages.augment        the images of a step
      decode_jpegs                of those that are encoded, on the device
      draw_view                   box and flip: a function of seed, epoch and row, as on a CPU
      augment_tensors             one kernel

The order of rows is another one in each epoch, so each worker keeps all rows.

Shapes: N rows, H, W, C channels, S pixels a side.
"""

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from catsdogs import data
from catsdogs.data.datasets import RowIndices
from catsdogs.data.decode import DecodeForTraining
from catsdogs.data.decode_messages import NOT_KEPT
from catsdogs.data.gpu_jpegs import MAX_GPU_PIXELS
from catsdogs.data.sandbox import group_by_bytes
from catsdogs.images.augment import augment_tensors, draw_view
from catsdogs.images.tensors import crop_centre, resize_tensors, synchronize_stream, to_device
from catsdogs.images.torch_decoders import decode_jpegs
from catsdogs.schema import OK, RETRYABLE_STATUSES
from catsdogs.train.worker import TrainWorker

MAX_DEVICE_SHARE = 0.4  # of the free memory, for decoded images
MAX_LEAD = 4  # steps that are queued while the next batch is prepared
MAX_MEMORY_SHARE = 0.25  # of a machine's memory, for JPEGs of all workers
# Of a training step, per image of 224 pixels a side in bf16: ResNet50 keeps two tensors of 11 million activations.
STEP_BYTES = 64 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """Bytes for decoded images on the device, and for JPEGs in the memory of the machine."""

    pixels: float
    jpegs: float


def measure_room(worker: TrainWorker) -> Room:
    """Measure the room for images. On a CPU there is none: the model takes many times as long as decoding."""
    if worker.device.type != "cuda":
        return Room(0, 0)
    config = worker.spec.config
    free, _ = torch.cuda.mem_get_info(worker.device)
    step = (
        config.local_batch_size * STEP_BYTES * (config.img_size / 224) ** 2 * (1 if worker.precision == "bf16" else 2)
    )
    # The CUDA graph of the step has separate memory, beside that of smaller batches.
    pixels = min(MAX_DEVICE_SHARE * free, free - 2 * step)
    return Room(max(0.0, pixels), MAX_MEMORY_SHARE * data.min_memory_bytes() / config.num_workers)


class ResidentImages:
    """Training images of a worker, by row; those that do not fit or had a transient error are not among them.

    Attributes:
        failed: rows that cannot be decoded, as tables with `path`, `status` and `error`.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._device = device
        self._pixels: dict[int, torch.Tensor] = {}  # uint8 (H, W, C), on the device
        self._jpegs: dict[int, torch.Tensor] = {}  # uint8, in the memory of the machine
        self._num_pixels: dict[int, int] = {}  # of the JPEGs
        self._is_resident_N = np.zeros(num_rows, dtype=bool)
        self._is_failed_N = np.zeros(num_rows, dtype=bool)
        self._stream: torch.cuda.Stream | None = None  # that JPEGs are decoded on
        self._starts: deque[torch.cuda.Event] = deque()  # of the last steps
        self.failed: list[pa.Table] = []

    def split(self, rows_N: RowIndices) -> tuple[RowIndices, RowIndices]:
        """Return those rows that are resident, and those that must be read; failed ones are left out."""
        is_resident_N = self._is_resident_N[rows_N]
        return rows_N[is_resident_N], rows_N[~is_resident_N & ~self._is_failed_N[rows_N]]

    def add_pixels(self, table: pa.Table) -> None:
        """Copy a table of `data.iter_full_size` to the device, its images packed."""
        ok = self._add_rows(table)
        if not ok.num_rows:
            return
        column = ok["image"].combine_chunks()
        _, offsets, content = column.buffers()
        ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        packed = to_device(np.frombuffer(content, np.uint8)[ends[0] : ends[-1]], self._device)
        parts = packed.split(np.diff(ends).tolist())
        sizes = (ok[name].to_pylist() for name in ("row", "width", "height"))
        for row, width, height, part in zip(*sizes, parts, strict=True):
            self._pixels[row] = part.view(height, width, 3)

    def add_jpegs(self, table: pa.Table) -> None:
        """Keep the files of a table of `data.iter_checked_jpegs`, encoded."""
        ok = self._add_rows(table)
        values = (ok[name].to_pylist() for name in ("row", "width", "height", "jpeg"))
        for row, width, height, jpeg in zip(*values, strict=True):
            self._jpegs[row] = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
            self._num_pixels[row] = width * height

    def _add_rows(self, table: pa.Table) -> pa.Table:
        """Register the rows of a table; return those with an image."""
        status_N, rows_N = np.array(table["status"].to_pylist()), table["row"].to_numpy()
        is_ok_N = status_N == OK
        is_failed_N = ~is_ok_N & ~np.isin(status_N, (NOT_KEPT, *RETRYABLE_STATUSES))
        self._is_resident_N[rows_N[is_ok_N]] = True
        self._is_failed_N[rows_N[is_failed_N]] = True
        self.failed.append(table.select(["path", "status", "error"]).filter(pa.array(is_failed_N)))
        return table.filter(pa.array(is_ok_N))

    def augment(self, rows_N: RowIndices, stage: DecodeForTraining) -> torch.Tensor:
        """Make the view of the stage's epoch of resident rows, uint8 (N, S, S, C).

        JPEGs are decoded on another stream than the steps, while the device still has steps to do.
        """
        if self._device.type != "cuda":
            return self._augment(rows_N, stage)
        current = torch.cuda.current_stream(self._device)
        self._limit_lead(current)
        if not self._jpegs:
            return self._augment(rows_N, stage)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(current)  # which has copied the pixels
        with torch.cuda.stream(self._stream):
            images_NHWC = self._augment(rows_N, stage)
        current.wait_stream(self._stream)
        images_NHWC.record_stream(current)
        return images_NHWC

    def _limit_lead(self, current: torch.cuda.Stream) -> None:
        """Wait until at most MAX_LEAD steps are queued: their batches take memory."""
        event = torch.cuda.Event(blocking=True)  # without it, waiting would occupy a core
        event.record(current)
        self._starts.append(event)
        if len(self._starts) > MAX_LEAD:
            self._starts.popleft().synchronize()

    def _augment(self, rows_N: RowIndices, stage: DecodeForTraining) -> torch.Tensor:
        groups = group_by_bytes(rows_N.tolist(), lambda row: self._num_pixels.get(row, 0), MAX_GPU_PIXELS)
        parts = [_augment_images(self._get_images(rows), rows, stage) for rows in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _get_images(self, rows: list[int]) -> list[torch.Tensor]:
        """Return the pixels of rows on the device, (H, W, C) with any strides."""
        encoded = [row for row in rows if row in self._jpegs]
        decoded = dict(zip(encoded, self._decode([self._jpegs[row] for row in encoded]), strict=True))
        return [decoded[row].permute(1, 2, 0) if row in decoded else self._pixels[row] for row in rows]

    def _decode(self, jpegs: list[torch.Tensor]) -> list[torch.Tensor]:
        if not jpegs:
            return []
        synchronize_stream(self._device)  # nvJPEG writes at once, also into freed memory that queued kernels still read
        try:
            return decode_jpegs(jpegs, self._device)
        except RuntimeError:  # libjpeg has decoded all of them before
            logger.debug("the device refused one of %d JPEGs", len(jpegs), exc_info=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # it may still be writing
            return [image.to(self._device) for image in decode_jpegs(jpegs, torch.device("cpu"))]


def _augment_images(images: list[torch.Tensor], rows: list[int], stage: DecodeForTraining) -> torch.Tensor:
    preprocessing, size = stage.preprocessing, stage.preprocessing.img_size
    if stage.augmentation == "none":
        resizes = [crop_centre(image.permute(2, 0, 1), preprocessing.resize_size, size) for image in images]
        return resize_tensors(resizes, size)
    views = [
        draw_view(image.shape[0], image.shape[1], stage.augmentation, stage.build_generator(row, stage.epochs[0]))
        for image, row in zip(images, rows, strict=True)
    ]
    return augment_tensors(images, views, size)


def load_resident_images(worker: TrainWorker, room: Room) -> ResidentImages:
    """Decode the training images and keep those that fit into the room."""
    files, images = worker.spec.train_files, ResidentImages(worker.spec.train_files.num_rows, worker.device)
    files = files.append_column("row", pa.array(np.arange(files.num_rows)))
    if room.pixels:
        for table in _take_bytes(data.iter_full_size(files), "image", room.pixels):
            images.add_pixels(table)
            worker.events.send_progress("decode", table["row"][-1].as_py() + 1, files.num_rows, "")
    _, others_N = images.split(np.arange(files.num_rows))
    if room.jpegs and len(others_N):
        for table in _take_bytes(data.iter_checked_jpegs(files.take(pa.array(others_N))), "jpeg", room.jpegs):
            images.add_jpegs(table)
            worker.events.send_progress("check", table["row"][-1].as_py() + 1, files.num_rows, "")
    return images


def _take_bytes(tables: Iterable[pa.Table], column: str, max_bytes: float) -> Iterable[pa.Table]:
    """Yield tables until their values in a column exceed `max_bytes`."""
    for table in tables:
        max_bytes -= table[column].nbytes
        if max_bytes < 0:
            return
        yield table
