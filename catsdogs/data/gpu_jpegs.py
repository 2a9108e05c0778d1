"""Batches whose JPEGs travel as they are, to a model's process: its GPU decodes them many times as fast as a CPU.

What the GPU refuses is decoded as everything else is, which tells what is wrong with it.

Shapes: N rows, S pixels a side.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from catsdogs.data.decode import DecodeForInference
from catsdogs.data.sandbox import DecodeRequest, DecodeResult, decode_in_subprocess, group_by_bytes
from catsdogs.images.tensors import decode_jpegs, to_device

MAX_GPU_PIXELS = 1 << 28  # of files that are decoded at once: 3 bytes each
DECODE_COLUMNS = ("status", "error", "width", "height", "decode_s")  # columns that decoding fills
SANDBOXED_BATCHES = 64  # after a restart: what the process died of, perhaps an image, comes again
Jpeg = tuple[int, torch.Tensor]  # its row and its content, uint8


class JpegDecoder:
    """Decodes the JPEGs of batches on a device; those that it refuses, and all after a crash, in the sandbox."""

    def __init__(self, stage: DecodeForInference, device: torch.device, restarted: bool) -> None:
        self._stage = stage
        self._device = device
        self._sandboxed_batches_left = SANDBOXED_BATCHES if restarted else 0

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, torch.Tensor]:
        """Decode a batch of a stage that passes JPEGs.

        Returns:
            The rows with what became of each, and uint8 (N, S, S, 3) on the device, zeros without an image.
        """
        size = self._stage.preprocessing.img_size
        images_NHWC = torch.zeros((rows.num_rows, size, size, 3), dtype=torch.uint8, device=self._device)
        pixels = {row: image for row, image in enumerate(rows["image"].to_pylist()) if image is not None}
        if pixels:
            decoded = np.frombuffer(b"".join(pixels.values()), np.uint8).reshape(-1, size, size, 3)
            images_NHWC[list(pixels)] = to_device(decoded, self._device)
        refused = passed = _split_jpegs(rows["jpeg"].combine_chunks())
        if self._sandboxed_batches_left:
            self._sandboxed_batches_left -= 1
        else:
            sides = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
            groups = group_by_bytes(passed, lambda one: math.prod(sides[one[0]]), MAX_GPU_PIXELS)
            refused = [one for group in groups for one in self._decode(group, images_NHWC)]
        results = self._decode_in_subprocess(refused, images_NHWC) if refused else {}
        return _with_results(rows, results), images_NHWC

    def _decode(self, group: list[Jpeg], images_NHWC: torch.Tensor) -> list[Jpeg]:
        """Decode files on the device; those that it refuses come back."""
        numbers, encoded = zip(*group, strict=True)
        preprocessing = self._stage.preprocessing
        try:
            views = decode_jpegs(encoded, preprocessing.resize_size, preprocessing.img_size, self._device)
        except RuntimeError:  # it does not tell which
            _synchronize(self._device)
            if len(group) == 1:
                return group
            half = len(group) // 2
            return [one for part in (group[:half], group[half:]) for one in self._decode(part, images_NHWC)]
        images_NHWC[list(numbers)] = views
        return []

    def _decode_in_subprocess(self, refused: Sequence[Jpeg], images_NHWC: torch.Tensor) -> dict[int, DecodeResult]:
        pixels = np.zeros((len(refused), *images_NHWC.shape[1:]), dtype=np.uint8)
        files = [
            DecodeRequest(content.numpy().tobytes(), row, image)
            for (row, content), image in zip(refused, pixels, strict=True)
        ]
        results = decode_in_subprocess(self._stage, files)
        images_NHWC[[row for row, _ in refused]] = to_device(pixels, self._device)
        return {row: answer for (row, _), answer in zip(refused, results, strict=True)}


def _synchronize(device: torch.device) -> None:
    """Wait until a decoder that failed writes no more; a process whose GPU is lost ends, and Ray starts it anew."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            os._exit(1)


def _split_jpegs(column: pa.LargeBinaryArray) -> list[Jpeg]:
    """List what is not null, copied once for all: torch wants it writable."""
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset :].tolist()
    encoded = torch.tensor(np.frombuffer(content or b"", np.uint8))
    rows = np.flatnonzero(np.asarray(column.is_valid())).tolist()
    return [(row, encoded[ends[row] : ends[row + 1]]) for row in rows]


def _with_results(rows: pa.Table, results: dict[int, DecodeResult]) -> pa.Table:
    """Put answers into the columns of their rows."""
    columns = {name: rows[name] for name in rows.column_names if name not in ("image", "jpeg")}
    for name in DECODE_COLUMNS:
        before = enumerate(rows[name].to_pylist())
        values = [getattr(results[row], name) if row in results else value for row, value in before]
        columns[name] = pa.array(values, rows.schema.field(name).type)
    return pa.table(columns)
