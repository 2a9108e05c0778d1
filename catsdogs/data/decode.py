"""Read and decode listed files to rows of uint8 pixels, in a Ray Data task.

    DecodeForInference.__call__(files)        one block of listed files
      storage.fetch_ahead                     read groups of files: bytes, or a status without bytes
      _decode_batch                           one batch: a row for every file
        decode_in_subprocess -> .decode       in the child: images.decode_image, then Preprocessing or augment
        build_decoded_table                   status, error, size and pixels as columns

Shapes: N rows, H, W, C channels, S pixels a side, V views of an image.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.data.blocks import MAX_BLOCK_BYTES
from catsdogs.data.decode_budget import DecodeBudget
from catsdogs.data.decode_messages import DecodeRequest, DecodeResult
from catsdogs.data.sandbox import decode_in_subprocess, group_by_bytes
from catsdogs.images import Decoded, ImageArray, Preprocessing, decode_image, read_gpu_decodable_size
from catsdogs.schema import OK

PREFETCH_BATCHES = 4  # decoded batches that wait for the model
BLOCK_ROWS = 256  # files of one task: enough that one slow read does not stop the others
READ_BYTES = 64 << 20  # of files that are read as one group
MAX_GPU_JPEG_BYTES = MAX_BLOCK_BYTES  # of a batch's JPEGs that stay encoded; the next READ_BYTES at most may exceed it


class FileResult(NamedTuple):
    """The outcome of reading and decoding a file.

    Attributes:
        jpeg: the content, if a GPU will decode it.
        sha256, file_format: of the content, for `audit_stage`.
    """

    result: DecodeResult
    size_bytes: int | None
    version: str | None
    retries: int
    jpeg: bytes | None = None
    sha256: bytes | None = None
    file_format: str | None = None


@dataclass(frozen=True)
class DecodeForInference:
    """Callable for map_batches that reads and decodes a block of files; every file stays a row.

    With `gpu_jpegs`, JPEGs that a GPU can decode stay encoded, in the column `jpeg`, for `gpu_jpegs.JpegDecoder`. With
    `large_blocks`, for models on GPUs, the blocks of a dataset are those of `blocks.py`.
    """

    preprocessing: Preprocessing
    max_pixels: int
    batch_size: int
    gpu_jpegs: bool = field(default=False, kw_only=True)
    large_blocks: bool = field(default=False, kw_only=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the pixels of a row."""
        return (self.preprocessing.img_size, self.preprocessing.img_size, 3)

    @property
    def batch_bytes(self) -> int:
        """Bytes of the pixels of a full batch."""
        return self.batch_size * math.prod(self.shape)

    @property
    def block_rows(self) -> int:
        """Rows of one task without `large_blocks`."""
        return self.batch_size * max(1, BLOCK_ROWS // self.batch_size)

    def split_into_blocks(self, files: pa.Table) -> list[pa.Table]:
        """Split listed files into blocks of whole batches, so that a model gets the same batches on every machine."""
        return [files.slice(start, self.block_rows) for start in range(0, files.num_rows, self.block_rows)]

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Yield decoded batches; the files of later batches are read meanwhile."""
        batches = [files.slice(start, self.batch_size) for start in range(0, files.num_rows, self.batch_size)]
        groups = [list(group_by_bytes(_list_entries(batch), storage.listed_bytes, READ_BYTES)) for batch in batches]
        with contextlib.closing(storage.fetch_ahead(itertools.chain(*groups), storage.MAX_IMAGE_BYTES)) as fetched:
            for batch in batches:
                yield self._decode_batch(batch, fetched)

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode one file to pixels of the stage's shape; runs in the child process."""
        decoded = decode_image(image_bytes, self.max_pixels)
        return decoded if decoded.image is None else replace(decoded, image=self.transform(decoded.image, row))

    def transform(self, image: ImageArray, _: int) -> ImageArray:
        """Make the pixels of a row, uint8 of the stage's shape, from a decoded image."""
        return self.preprocessing(image)

    def _decode_batch(self, files: pa.Table, fetched: Iterator[list[storage.Fetched]]) -> pa.Table:
        started = time.perf_counter()
        images_NHWC = np.zeros((files.num_rows, *self.shape), dtype=np.uint8)
        row_ids = files["row"].to_pylist() if "row" in files.column_names else range(files.num_rows)
        outputs = zip(row_ids, images_NHWC, strict=True)
        budget = DecodeBudget.for_batch(files.num_rows)
        results: list[FileResult] = []
        jpeg_bytes = 0
        while len(results) < files.num_rows:  # no group has files of two batches
            group = next(fetched)
            keep_jpegs = self.gpu_jpegs and jpeg_bytes < MAX_GPU_JPEG_BYTES
            decoded = self._decode_group(group, outputs, budget, keep_jpegs)
            jpeg_bytes += sum(len(file.jpeg or b"") for file in decoded)
            results += decoded
            del group  # before the next one is read
        decode_s = sum(file.result.decode_s for file in results)
        # All time outside of the decoder, most of it waiting for reads.
        read_s = max(0.0, time.perf_counter() - started - decode_s) / max(1, files.num_rows)
        return self.build_rows(files, results, images_NHWC, read_s)

    def build_rows(
        self, files: pa.Table, results: Sequence[FileResult], images_NHWC: ImageArray, read_s: float
    ) -> pa.Table:
        """Build the rows of a batch from its files, their results and pixels."""
        rows = build_decoded_table(files, results, images_NHWC, read_s)
        return _add_jpegs(rows, [file.jpeg for file in results], images_NHWC) if self.gpu_jpegs else rows

    def _decode_group(
        self,
        group: Sequence[storage.Fetched],
        outputs: Iterator[tuple[int, ImageArray]],
        budget: DecodeBudget,
        keep_jpegs: bool,
    ) -> list[FileResult]:
        """Decode files that were read together; each takes the next row and array for pixels of `outputs`.

        With `keep_jpegs`, JPEGs that a GPU can decode stay encoded.
        """
        results: dict[int, DecodeResult] = {}
        requests: dict[int, DecodeRequest] = {}
        for i, (file, (row, pixels)) in enumerate(zip(group, outputs, strict=False)):
            if file.content is None:
                results[i] = DecodeResult(file.status, file.error, None, None, 0.0)
            elif keep_jpegs and (gpu_size := self._read_gpu_decodable_size(file.content)) is not None:
                results[i] = DecodeResult(OK, None, *gpu_size, 0.0)
            else:
                requests[i] = DecodeRequest(file.content, row, pixels)
        results |= zip(requests, decode_in_subprocess(self, list(requests.values()), budget), strict=True)
        return [
            FileResult(
                results[i],
                size_bytes=None if file.content is None else len(file.content),
                version=file.version,
                retries=file.retries,
                jpeg=None if i in requests else file.content,
            )
            for i, file in enumerate(group)
        ]

    def _read_gpu_decodable_size(self, image_bytes: bytes) -> tuple[int, int] | None:
        return read_gpu_decodable_size(image_bytes, self.max_pixels) if len(image_bytes) <= READ_BYTES else None


@dataclass(frozen=True)
class DecodeForTraining(DecodeForInference):
    """The same for augmented images, one view for each epoch; the randomness depends on seed, epoch and row only."""

    augmentation: str
    seed: int
    epochs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.preprocessing.img_size
        return (len(self.epochs) * side, side, 3)

    def transform(self, image: ImageArray, row: int) -> ImageArray:
        """Augment a decoded image to V views, one below the other: uint8 (V*S, S, 3)."""
        return np.concatenate([self._augment(image, row, epoch) for epoch in self.epochs])

    def _augment(self, image: ImageArray, row: int, epoch: int) -> ImageArray:
        if self.augmentation == "none":
            return self.preprocessing(image)
        from catsdogs.images.augment import augment  # imports torch, which drivers do not need

        return augment(image, self.augmentation, self.preprocessing.img_size, self.build_generator(row, epoch))

    def build_generator(self, row: int, epoch: int) -> np.random.Generator:
        """Build the generator of a view, the same on every worker and after every restart."""
        return np.random.default_rng([self.seed, epoch, row])


def _list_entries(files: pa.Table) -> list[storage.Entry]:
    names = ("path", "size_bytes", "version")
    return [storage.Entry(*values) for values in zip(*(files[name].to_pylist() for name in names), strict=True)]


def build_decoded_table(
    files: pa.Table, results: Sequence[FileResult], images_NHWC: ImageArray, read_s: float
) -> pa.Table:
    """Build the rows of a batch, with the pixels as fixed-size binary; those of a file without an image are zeros."""
    decoded = [file.result for file in results]
    image_type = pa.binary(math.prod(images_NHWC.shape[1:]))
    columns = {  # a path list has neither size nor version
        "size_bytes": pc.coalesce(files["size_bytes"], pa.array([file.size_bytes for file in results], pa.int64())),
        "version": pc.coalesce(pa.array([file.version for file in results], pa.string()), files["version"]),
        "status": pa.array([result.status for result in decoded], pa.string()),
        "error": pa.array([result.error for result in decoded], pa.string()),
        "width": pa.array([result.width for result in decoded], pa.int32()),
        "height": pa.array([result.height for result in decoded], pa.int32()),
        "retries": pa.array([file.retries for file in results], pa.int32()),
        "read_s": pa.array(np.full(files.num_rows, read_s, dtype=np.float32)),
        "decode_s": pa.array([result.decode_s for result in decoded], pa.float32()),
        "image": pa.Array.from_buffers(image_type, files.num_rows, [None, pa.py_buffer(images_NHWC)]),
    }
    kept = files.drop_columns(["size_bytes", "version"])
    return pa.table({**{name: kept[name] for name in kept.column_names}, **columns})


def _add_jpegs(rows: pa.Table, jpegs: Sequence[bytes | None], images_NHWC: ImageArray) -> pa.Table:
    """Add the encoded JPEGs as a column; `image` is null in rows without decoded pixels."""
    ok = [status == OK for status in rows["status"].to_pylist()]
    pixels = [image.tobytes() if ok[i] and jpegs[i] is None else None for i, image in enumerate(images_NHWC)]
    columns = {"image": pa.array(pixels, pa.large_binary()), "jpeg": pa.array(jpegs, pa.large_binary())}
    return pa.table({name: rows[name] for name in rows.column_names} | columns)


def view_images(rows: pa.Table, img_size: int) -> ImageArray:
    """View the pixels of decoded rows, uint8 (N*V, S, S, 3), read-only; the V views of a row are adjacent."""
    column = rows["image"].combine_chunks() if isinstance(rows["image"], pa.ChunkedArray) else rows["image"]
    pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    row_bytes = column.type.byte_width
    start = column.offset * row_bytes
    return pixels[start : start + len(column) * row_bytes].reshape(-1, img_size, img_size, 3)
