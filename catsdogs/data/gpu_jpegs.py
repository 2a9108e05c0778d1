"""Decode JPEGs on a model's GPU, many times as fast as on a CPU.

`DecodeForInference` leaves plain JPEGs encoded in its batches; `JpegDecoder` decodes them in the process of the model.
The sandbox decodes those that the GPU refuses or that may lack data, and decides their status.

Shapes: N rows, S pixels a side.
"""

import logging
import math
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from catsdogs.data.decode import DecodeForInference
from catsdogs.data.decode_messages import DecodeRequest, DecodeResult
from catsdogs.data.sandbox import decode_in_subprocess, group_by_bytes
from catsdogs.images.jpeg import MISSING_LEVEL
from catsdogs.images.tensors import resize_and_crop_tensors, to_device
from catsdogs.images.torch_decoders import decode_jpegs

MAX_GPU_PIXELS = 1 << 28  # decoded at once, 3 bytes each
DECODE_COLUMNS = ("status", "error", "width", "height", "decode_s")
# After a restart these are decoded in the sandbox: Ray repeats the batch that killed the process.
SANDBOXED_BATCHES = 64
Jpeg = tuple[int, torch.Tensor]  # the row of a file in its batch, and its content, uint8
logger = logging.getLogger(__name__)


class JpegDecoder:
    """Decodes the JPEGs of batches on a device; those that it refuses, and all after a crash, in the sandbox."""

    def __init__(self, stage: DecodeForInference, device: torch.device, restarted: bool) -> None:
        self._stage = stage
        self._device = device
        self._sandboxed_batches_left = SANDBOXED_BATCHES if restarted else 0

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, torch.Tensor]:
        """Decode a batch to rows without `image` and `jpeg`, and uint8 (N, S, S, 3) on the device, zeros if not ok."""
        size = self._stage.preprocessing.img_size
        images_NHWC = torch.zeros((rows.num_rows, size, size, 3), dtype=torch.uint8, device=self._device)
        images = {row: image for row, image in enumerate(rows["image"].to_pylist()) if image is not None}
        if images:
            decoded = np.frombuffer(b"".join(images.values()), np.uint8).reshape(-1, size, size, 3)
            images_NHWC[list(images)] = to_device(decoded, self._device)
        refused = jpegs = _list_jpegs(rows["jpeg"].combine_chunks())
        if self._sandboxed_batches_left:
            self._sandboxed_batches_left -= 1
        else:
            sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
            groups = group_by_bytes(jpegs, lambda jpeg: math.prod(sizes[jpeg[0]]), MAX_GPU_PIXELS)
            refused = [jpeg for group in groups for jpeg in self._decode(group, images_NHWC)]
        results = self._decode_in_subprocess(refused, images_NHWC) if refused else {}
        return _with_results(rows, results), images_NHWC

    def _decode(self, group: list[Jpeg], images_NHWC: torch.Tensor) -> list[Jpeg]:
        """Decode files on the device; return those that it refuses."""
        rows, sources = zip(*group, strict=True)
        decoded = self._decode_on_device(sources)
        if decoded is not None:
            images_NHWC[list(rows)], may_lack_data = decoded
            return [jpeg for jpeg, is_suspect in zip(group, may_lack_data, strict=True) if is_suspect]
        if len(group) == 1:
            return group
        half = len(group) // 2  # the decoder does not report which file it refuses
        return [jpeg for part in (group[:half], group[half:]) for jpeg in self._decode(part, images_NHWC)]

    def _decode_on_device(self, sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[bool]] | None:
        """Decode, resize and crop; also return which files may lack data, because their last pixel is gray.

        None if the decoder refuses a file or the device is out of memory.
        """
        try:
            images = decode_jpegs(sources, self._device)
        except RuntimeError:
            logger.debug("the device refused one of %d JPEGs", len(sources), exc_info=True)
            _synchronize(self._device)
            return None
        preprocessing = self._stage.preprocessing
        try:
            views_NHWC = resize_and_crop_tensors(images, preprocessing.resize_size, preprocessing.img_size)
            last_NC = torch.stack([image[:, -1, -1] for image in images])
            return views_NHWC, (last_NC == MISSING_LEVEL).all(dim=1).tolist()
        except torch.OutOfMemoryError:
            logger.debug("no memory to resize %d images", len(sources), exc_info=True)
            return None

    def _decode_in_subprocess(self, refused: Sequence[Jpeg], images_NHWC: torch.Tensor) -> dict[int, DecodeResult]:
        images = np.zeros((len(refused), *images_NHWC.shape[1:]), dtype=np.uint8)
        pairs = zip(refused, images, strict=True)
        requests = [DecodeRequest(content.numpy().tobytes(), row, image) for (row, content), image in pairs]
        results = decode_in_subprocess(self._stage, requests)
        images_NHWC[[row for row, _ in refused]] = to_device(images, self._device)
        return {row: result for (row, _), result in zip(refused, results, strict=True)}


def _synchronize(device: torch.device) -> None:
    """Wait until a failed decoder stops writing. If the GPU is lost, exit, so that Ray restarts the process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            logger.debug("the GPU is lost", exc_info=True)
            os._exit(1)


def _list_jpegs(column: pa.LargeBinaryArray) -> list[Jpeg]:
    """List the non-null files of a column as views of one writable copy, because torch needs writable memory."""
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset :].tolist()
    encoded = torch.tensor(np.frombuffer(content or b"", np.uint8))
    rows = np.flatnonzero(np.asarray(column.is_valid())).tolist()
    return [(row, encoded[ends[row] : ends[row + 1]]) for row in rows]


def _with_results(rows: pa.Table, results: dict[int, DecodeResult]) -> pa.Table:
    """Replace DECODE_COLUMNS in the rows that have a result."""
    columns = {name: rows[name] for name in rows.column_names if name not in ("image", "jpeg")}
    for name in DECODE_COLUMNS:
        before = enumerate(rows[name].to_pylist())
        values = [getattr(results[row], name) if row in results else value for row, value in before]
        columns[name] = pa.array(values, rows.schema.field(name).type)
    return pa.table(columns)
