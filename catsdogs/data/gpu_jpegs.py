"""Decode JPEGs on a model's GPU, many times as fast as on a CPU.

`DecodeForInference` leaves plain JPEGs encoded in its batches; `JpegDecoder` decodes them in the process of the model.
The sandbox decodes those that the GPU refuses or that may lack data, and decides their status.

    JpegDecoder.decode                        one batch of rows
      _list_jpegs                             views of Ray's object store
      images.torch_decoders.decode_jpegs      on the GPU; the thread waits for the pixels
      resize_tensors                          queued on the stream of the thread
      _arrange                                rows of several groups in the order of the batch
    Predictor.predict                         queued; the thread waits for the probabilities
    JpegDecoder.complete                      reads which files may lack data; most batches have none

Threads decode different batches at the same time, each on its own stream.

Shapes: N rows, S pixels a side.
"""

import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack

from catsdogs.data.decode import DecodeForInference
from catsdogs.data.decode_messages import DecodeRequest, DecodeResult
from catsdogs.data.sandbox import decode_in_subprocess, group_by_bytes
from catsdogs.images.jpeg import MISSING_LEVEL
from catsdogs.images.tensors import crop_centre, resize_tensors, synchronize_stream, to_device
from catsdogs.images.torch_decoders import decode_jpegs

MAX_GPU_PIXELS = 1 << 28  # decoded at once, 3 bytes each
DECODE_COLUMNS = ("status", "error", "width", "height", "decode_s")
# After a restart these are decoded in the sandbox: Ray repeats the batches of the blocks that the process had, up to
# twice as many blocks as threads.
SANDBOXED_BATCHES = 96
Jpeg = tuple[int, torch.Tensor]  # the row of a file in its batch, and its content, uint8
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """JPEGs that the device decoded.

    Attributes:
        images_NHWC: uint8, on the device.
        is_gray_N: bool, on the device: the last pixel is gray, so the file may lack data.
    """

    jpegs: list[Jpeg]
    images_NHWC: torch.Tensor
    is_gray_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class GpuBatch:
    """A batch on the device.

    Attributes:
        rows: without `image` and `jpeg`.
        images_NHWC: uint8 (N, S, S, 3), on the device; zeros if not ok.
    """

    rows: pa.Table
    images_NHWC: torch.Tensor
    decoded: Sequence[_Decoded]


class JpegDecoder:
    """Decodes the JPEGs of batches on a device; those that it refuses, and all after a crash, in the sandbox."""

    def __init__(self, stage: DecodeForInference, device: torch.device, restarted: bool) -> None:
        self._stage = stage
        self._device = device
        self._batch_numbers = itertools.count()  # unlike +=, safe between threads
        self._num_sandboxed = SANDBOXED_BATCHES if restarted else 0
        self._resize([torch.zeros((3, 8, 8), dtype=torch.uint8, device=device)])  # the first time, a GPU compiles it

    def decode(self, rows: pa.Table) -> GpuBatch:
        """Decode a batch; it waits for the decoder of the device, not for the resizing."""
        size = self._stage.preprocessing.img_size
        refused = jpegs = _list_jpegs(rows["jpeg"])
        decoded: list[_Decoded] = []
        if next(self._batch_numbers) >= self._num_sandboxed:
            sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
            groups = group_by_bytes(jpegs, lambda jpeg: math.prod(sizes[jpeg[0]]), MAX_GPU_PIXELS)
            refused = [jpeg for group in groups for jpeg in self._decode(group, decoded)]
        on_cpu = {i: image for i, image in enumerate(rows["image"].to_pylist()) if image is not None}
        pixels = np.frombuffer(b"".join(on_cpu.values()), np.uint8).reshape(-1, size, size, 3)
        parts = [([i for i, _ in group.jpegs], group.images_NHWC) for group in decoded]
        parts += [(list(on_cpu), to_device(pixels, self._device))] if on_cpu else []
        images_NHWC = _arrange(parts, (rows.num_rows, size, size, 3), self._device)
        return self._sandbox(GpuBatch(rows.drop_columns(["image", "jpeg"]), images_NHWC, decoded), refused)

    def complete(self, batch: GpuBatch) -> GpuBatch | None:
        """Decode the files that may lack data in the sandbox; None if there are none.

        It waits for all that is queued on the stream, so call it after the model.
        """
        flags = [(group.jpegs, group.is_gray_N.tolist()) for group in batch.decoded]
        suspects = [jpeg for jpegs, are_gray in flags for jpeg, is_gray in zip(jpegs, are_gray, strict=True) if is_gray]
        return self._sandbox(batch, suspects) if suspects else None

    def _decode(self, group: list[Jpeg], decoded: list[_Decoded]) -> list[Jpeg]:
        """Decode files on the device, appended to `decoded`; return those that it refuses."""
        on_device = self._decode_on_device(group)
        if on_device is not None:
            decoded.append(on_device)
            return []
        if len(group) == 1:
            return group
        half = len(group) // 2  # the decoder does not report which file it refuses
        return [jpeg for part in (group[:half], group[half:]) for jpeg in self._decode(part, decoded)]

    def _decode_on_device(self, group: list[Jpeg]) -> _Decoded | None:
        """Decode, resize and crop; None if the decoder refuses a file or the device is out of memory."""
        # nvJPEG's hardware writes at once, also into freed memory that queued kernels still read.
        synchronize_stream(self._device)
        try:
            images = decode_jpegs([content for _, content in group], self._device)
        except RuntimeError:
            logger.debug("the device refused one of %d JPEGs", len(group), exc_info=True)
            _synchronize(self._device)
            return None
        try:
            views_NHWC = self._resize(images)
            last_NC = torch.stack([image[:, -1, -1] for image in images])
            return _Decoded(group, views_NHWC, (last_NC == MISSING_LEVEL).all(dim=1))
        except torch.OutOfMemoryError:
            logger.debug("no memory to resize %d images", len(group), exc_info=True)
            return None

    def _resize(self, images: list[torch.Tensor]) -> torch.Tensor:
        preprocessing, size = self._stage.preprocessing, self._stage.preprocessing.img_size
        return resize_tensors([crop_centre(image, preprocessing.resize_size, size) for image in images], size)

    def _sandbox(self, batch: GpuBatch, jpegs: Sequence[Jpeg]) -> GpuBatch:
        """Decode files in the sandbox, and replace their results and pixels in a batch."""
        if not jpegs:
            return batch
        images_NHWC = np.zeros((len(jpegs), *batch.images_NHWC.shape[1:]), dtype=np.uint8)
        pairs = zip(jpegs, images_NHWC, strict=True)
        requests = [DecodeRequest(content.numpy().tobytes(), row, image) for (row, content), image in pairs]
        results = decode_in_subprocess(self._stage, requests)
        indices = [row for row, _ in jpegs]
        batch.images_NHWC[indices] = to_device(images_NHWC, self._device)
        return replace(batch, rows=_with_results(batch.rows, dict(zip(indices, results, strict=True))))


def _arrange(
    parts: Sequence[tuple[list[int], torch.Tensor]], shape: tuple[int, int, int, int], device: torch.device
) -> torch.Tensor:
    """Put the rows of the parts in the order of a batch; the others are zeros."""
    order = [row for rows, _ in parts for row in rows]
    if order == list(range(shape[0])):
        return parts[0][1] if len(parts) == 1 else torch.cat([images for _, images in parts])
    images_NHWC = torch.zeros(shape, dtype=torch.uint8, device=device)
    if order:
        indices = to_device(np.array(order, dtype=np.int64), device)
        images_NHWC.index_copy_(0, indices, torch.cat([images for _, images in parts]))
    return images_NHWC


def _synchronize(device: torch.device) -> None:
    """Wait until a failed decoder stops writing. If the GPU is lost, exit, so that Ray restarts the process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            logger.debug("the GPU is lost", exc_info=True)
            os._exit(1)


def _list_jpegs(column: pa.ChunkedArray) -> list[Jpeg]:
    """List the non-null files of a column as views of its buffer, in Ray's object store: do not write."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    _, offsets, content = array.buffers()
    if content is None:
        return []
    # By DLPack, since `torch.frombuffer` warns that the memory is read-only.
    encoded = torch.utils.dlpack.from_dlpack(pa.Array.from_buffers(pa.uint8(), content.size, [None, content]))
    ends = np.frombuffer(offsets, np.int64)[array.offset :].tolist()
    rows = np.flatnonzero(np.asarray(array.is_valid())).tolist()
    return [(row, encoded[ends[row] : ends[row + 1]]) for row in rows]


def _with_results(rows: pa.Table, results: Mapping[int, DecodeResult]) -> pa.Table:
    """Replace DECODE_COLUMNS in the rows that have a result."""
    columns = {name: rows[name] for name in rows.column_names}
    for name in DECODE_COLUMNS:
        before = enumerate(rows[name].to_pylist())
        values = [getattr(results[row], name) if row in results else value for row, value in before]
        columns[name] = pa.array(values, rows.schema.field(name).type)
    return pa.table(columns)
