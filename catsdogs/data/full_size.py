"""Decode training images to their full size, or check JPEGs, once for all epochs of a run on a GPU.

Files are listed with their `row`. Tables have them in order, with the columns of `decode.build_decoded_table`; a task
makes one table. `train/resident.py` keeps what is in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.data.decode import DecodeForInference, FileResult, view_images
from catsdogs.data.decode_budget import DecodeBudget
from catsdogs.data.decode_messages import NOT_KEPT
from catsdogs.data.tasks import map_in_tasks
from catsdogs.images import MAX_PIXELS, Decoded, ImageArray, Preprocessing, decode_image
from catsdogs.schema import OK

MAX_SIDE = 1024  # of a square; images with more pixels are not kept decoded
DECODE_BATCH_SIZE = 32
TASK_ROWS = 64


def iter_full_size(files: pa.Table) -> Iterator[pa.Table]:
    """Decode files. Those with an image have its size, and its pixels in `image`; large ones are NOT_KEPT."""
    return map_in_tasks(_decode_full_size, _split(files))


def iter_checked_jpegs(files: pa.Table) -> Iterator[pa.Table]:
    """Decode files and drop the pixels. JPEGs that a GPU can decode have their content in `jpeg`; others NOT_KEPT."""
    return map_in_tasks(_check_jpegs, _split(files))


def _split(files: pa.Table) -> Iterator[pa.Table]:
    return (files.slice(start, TASK_ROWS) for start in range(0, files.num_rows, TASK_ROWS))


def _decode_full_size(files: pa.Table) -> pa.Table:
    stage = _DecodeFullSize(Preprocessing(img_size=MAX_SIDE), MAX_PIXELS, DECODE_BATCH_SIZE)
    return pa.concat_tables(_drop_padding(batch) for batch in stage(files))


def _check_jpegs(files: pa.Table) -> pa.Table:
    stage = _CheckJpegs(Preprocessing(), MAX_PIXELS, DECODE_BATCH_SIZE, gpu_jpegs=True)
    return pa.concat_tables(batch.drop_columns(["image"]) for batch in stage(files))


@dataclass(frozen=True)
class _DecodeFullSize(DecodeForInference):
    """Decodes files at their full size; each row has the pixels, then padding."""

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        decoded = decode_image(image_bytes, self.max_pixels)
        if decoded.image is None:
            return decoded
        height, width, _ = decoded.image.shape
        if height * width > MAX_SIDE * MAX_SIDE:
            return Decoded(NOT_KEPT, None, None, None, None)
        padded = np.zeros(self.shape, dtype=np.uint8)
        padded.reshape(-1)[: decoded.image.size] = decoded.image.reshape(-1)
        return replace(decoded, image=padded, width=width, height=height)  # EXIF may swap the stored sides


def _drop_padding(rows: pa.Table) -> pa.Table:
    sides = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), rows["status"].to_pylist(), strict=True)
    sizes = [width * height * 3 if status == OK else 0 for width, height, status in sides]
    images = view_images(rows, MAX_SIDE).reshape(rows.num_rows, -1)
    pixels = pa.array([image[:size].tobytes() for image, size in zip(images, sizes, strict=True)], pa.large_binary())
    return rows.drop_columns(["image"]).append_column("image", pixels)


@dataclass(frozen=True)
class _CheckJpegs(DecodeForInference):
    """Decodes files for their status alone, so that a GPU need not decide which are damaged."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 1, 3)

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        decoded = decode_image(image_bytes, self.max_pixels)
        if decoded.image is None:
            return decoded
        if self._read_gpu_decodable_size(image_bytes) is None:
            return Decoded(NOT_KEPT, None, None, None, None)
        return replace(decoded, image=np.zeros(self.shape, dtype=np.uint8))

    def _decode_group(
        self,
        group: Sequence[storage.Fetched],
        outputs: Iterator[tuple[int, ImageArray]],
        budget: DecodeBudget,
        keep_jpegs: bool,
    ) -> list[FileResult]:
        files = super()._decode_group(group, outputs, budget, keep_jpegs=False)
        return [
            file._replace(jpeg=fetched.content) if file.result.status == OK else file
            for file, fetched in zip(files, group, strict=True)
        ]
