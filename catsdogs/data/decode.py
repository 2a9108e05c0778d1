"""Listed files -> rows of uint8 pixels. Shapes: N rows, S pixels a side."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.data.sandbox import (
    MAX_DECODE_BYTES,
    Decoder,
    DecodeRequest,
    DecodeResult,
    decode_in_subprocess,
    group_by_bytes,
)
from catsdogs.images import Decoded, ImageArray, Preprocessing, decode, read_gpu_decodable_size
from catsdogs.schema import OK

PREFETCH_BATCHES = 4  # decoded batches that wait for the model
READ_BYTES = 64 << 20  # of files that are decoded once all of them are read
MAX_GPU_JPEG_BYTES = 128 << 20  # of a batch's files that are passed as they are

GpuJpegSize = Callable[[bytes], tuple[int, int] | None]  # the size of an image that is left to others, as it is


@dataclass(frozen=True)
class DecodeForInference:
    """A Ray Data stage: files -> the model's view of them, in batches."""

    preprocessing: Preprocessing
    max_pixels: int
    batch_size: int
    gpu_jpegs: bool = False  # those that a GPU decodes, as they are; `jpegs.py` goes on with them

    @property
    def batch_bytes(self) -> int:
        """What the pixels of a full batch take."""
        return self.batch_size * self.preprocessing.img_size**2 * 3

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Read and decode files, a batch at a time; every file stays a row."""
        side = self.preprocessing.img_size
        gpu_jpeg_size = self._read_gpu_jpeg_size if self.gpu_jpegs else None
        return decode_batches(files, self.batch_size, (side, side, 3), self, gpu_jpeg_size)

    def _read_gpu_jpeg_size(self, image_bytes: bytes) -> tuple[int, int] | None:
        return read_gpu_decodable_size(image_bytes, self.max_pixels)

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        """Decode one file to the model's view, uint8 (S, S, 3)."""
        decoded = decode(image_bytes, self.max_pixels)
        return decoded if decoded.image is None else replace(decoded, image=self.preprocessing(decoded.image))


@dataclass(frozen=True)
class DecodeForTraining:
    """A Ray Data stage: files -> augmented pixels, random by seed, epoch and row alone; one view for each epoch."""

    preprocessing: Preprocessing
    max_pixels: int
    batch_size: int
    kind: str
    seed: int
    epochs: tuple[int, ...]
    gpu_jpegs: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a row's pixels."""
        side = self.preprocessing.img_size
        return (len(self.epochs) * side, side, 3)

    @property
    def batch_bytes(self) -> int:
        """What the pixels of a full batch take."""
        return self.batch_size * math.prod(self.shape)

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Read, decode and augment files, a batch at a time; every file stays a row."""
        return decode_batches(files, self.batch_size, self.shape, self)

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode one file to its views."""
        decoded = decode(image_bytes, self.max_pixels)
        return decoded if decoded.image is None else replace(decoded, image=self.views(decoded.image, row))

    def views(self, image: ImageArray, row: int) -> ImageArray:
        """Augment a decoded image, uint8 (V*S, S, 3): V views, one below the other."""
        return np.concatenate([self._augmented(image, row, epoch) for epoch in self.epochs])

    def _augmented(self, image: ImageArray, row: int, epoch: int) -> ImageArray:
        if self.kind == "none":
            return self.preprocessing(image)
        from catsdogs.images.augment import augment  # not above: torch, which a driver can do without

        rng = np.random.default_rng([self.seed, epoch, row])
        return augment(image, self.kind, self.preprocessing.img_size, rng)


def view_images(rows: pa.Table, img_size: int) -> ImageArray:
    """View the pixels of decoded rows, uint8 (N*V, S, S, 3), the V views of a row together; read-only."""
    column = rows["image"].combine_chunks() if isinstance(rows["image"], pa.ChunkedArray) else rows["image"]
    pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    row_bytes = column.type.byte_width
    start = column.offset * row_bytes
    return pixels[start : start + len(column) * row_bytes].reshape(-1, img_size, img_size, 3)


class FileResult(NamedTuple):
    """What is kept of a file once it is decoded, or `jpeg`, its content, where that is left to others."""

    result: DecodeResult
    size_bytes: int | None
    version: str | None
    retries: int
    jpeg: bytes | None = None


def decode_batches(
    files: pa.Table,
    batch_size: int,
    shape: tuple[int, int, int],
    decoder: Decoder,
    gpu_jpeg_size: GpuJpegSize | None = None,
) -> Iterator[pa.Table]:
    """Decode batch after batch while the files of later ones are read; those that are passed stay as they are."""
    batches = [files.slice(start, batch_size) for start in range(0, files.num_rows, batch_size)]
    groups = [list(group_by_bytes(_entries(batch), storage.listed_bytes, READ_BYTES)) for batch in batches]
    with contextlib.closing(storage.fetch_ahead(itertools.chain(*groups), MAX_DECODE_BYTES)) as bodies:
        for batch, of_batch in zip(batches, groups, strict=True):
            yield _decode_batch(batch, itertools.islice(bodies, len(of_batch)), shape, decoder, gpu_jpeg_size)


def _decode_batch(
    files: pa.Table,
    bodies: Iterable[list[storage.Fetched]],
    shape: tuple[int, int, int],
    decoder: Decoder,
    gpu_jpeg_size: GpuJpegSize | None,
) -> pa.Table:
    began = time.perf_counter()
    images_NHWC = np.zeros((files.num_rows, *shape), dtype=np.uint8)
    numbers = files["row"].to_pylist() if "row" in files.column_names else range(files.num_rows)
    places = zip(numbers, images_NHWC, strict=True)
    within = _limit_bytes(MAX_GPU_JPEG_BYTES, gpu_jpeg_size)
    done = [read for group in bodies for read in _decode_group(decoder, group, places, within)]
    decode_s = sum(read.result.decode_s for read in done)
    read_s = max(0.0, time.perf_counter() - began - decode_s) / max(1, files.num_rows)
    rows = build_decoded_table(files, done, images_NHWC, read_s)
    return rows if gpu_jpeg_size is None else _with_jpegs(rows, [read.jpeg for read in done], images_NHWC)


def _limit_bytes(most_bytes: int, gpu_jpeg_size: GpuJpegSize | None) -> GpuJpegSize:
    """Pass files until they are so many bytes together."""
    left = most_bytes

    def within(image_bytes: bytes) -> tuple[int, int] | None:
        nonlocal left
        size = gpu_jpeg_size(image_bytes) if gpu_jpeg_size and len(image_bytes) <= left else None
        left -= len(image_bytes) if size else 0
        return size

    return within


def _with_jpegs(rows: pa.Table, jpegs: Sequence[bytes | None], images_NHWC: ImageArray) -> pa.Table:
    """Put what was passed into a column of its own; pixels take room where there are some."""
    ok = [status == OK for status in rows["status"].to_pylist()]
    pixels = [image.tobytes() if ok[i] and jpegs[i] is None else None for i, image in enumerate(images_NHWC)]
    columns = {"image": pa.array(pixels, pa.large_binary()), "jpeg": pa.array(jpegs, pa.large_binary())}
    return pa.table({name: rows[name] for name in rows.column_names} | columns)


def build_decoded_table(
    files: pa.Table, done: Sequence[FileResult], images_NHWC: ImageArray, read_s: float
) -> pa.Table:
    """Put files, what became of them and their pixels, zeros without an image, into the columns of a batch."""
    results = [read.result for read in done]
    image_type = pa.binary(math.prod(images_NHWC.shape[1:]))
    columns = {  # a manifest knows neither size nor version
        "size_bytes": pc.coalesce(files["size_bytes"], pa.array([read.size_bytes for read in done], pa.int64())),
        "version": pc.coalesce(pa.array([read.version for read in done], pa.string()), files["version"]),
        "status": pa.array([result.status for result in results], pa.string()),
        "error": pa.array([result.error for result in results], pa.string()),
        "width": pa.array([result.width for result in results], pa.int32()),
        "height": pa.array([result.height for result in results], pa.int32()),
        "retries": pa.array([read.retries for read in done], pa.int32()),
        "read_s": pa.array(np.full(files.num_rows, read_s, dtype=np.float32)),
        "decode_s": pa.array([result.decode_s for result in results], pa.float32()),
        "image": pa.Array.from_buffers(image_type, files.num_rows, [None, pa.py_buffer(images_NHWC)]),
    }
    kept = files.drop_columns(["size_bytes", "version"])
    return pa.table({**{name: kept[name] for name in kept.column_names}, **columns})


def _decode_group(
    decoder: Decoder,
    fetched: Sequence[storage.Fetched],
    places: Iterator[tuple[int, ImageArray]],
    gpu_jpeg_size: GpuJpegSize,
) -> list[FileResult]:
    """Decode what came of files that were read together; each takes a row's number and where its pixels go."""
    numbered = [(file, *next(places)) for file in fetched]
    sizes = [None if file.image_bytes is None else gpu_jpeg_size(file.image_bytes) for file in fetched]
    found = [
        DecodeRequest(file.image_bytes, row, pixels)
        for (file, row, pixels), size in zip(numbered, sizes, strict=True)
        if file.image_bytes is not None and size is None
    ]
    results = iter(decode_in_subprocess(decoder, found))
    done = []
    for file, size in zip(fetched, sizes, strict=True):
        if file.image_bytes is None:
            done.append(
                FileResult(DecodeResult(file.status, file.error, None, None, 0.0), None, file.version, file.retries)
            )
        elif size is not None:
            done.append(
                FileResult(
                    DecodeResult(OK, None, *size, 0.0),
                    len(file.image_bytes),
                    file.version,
                    file.retries,
                    file.image_bytes,
                )
            )
        else:
            done.append(FileResult(next(results), len(file.image_bytes), file.version, file.retries))
    return done


def _entries(files: pa.Table) -> list[storage.Entry]:
    names = ("path", "size_bytes", "version")
    return [storage.Entry(*values) for values in zip(*(files[name].to_pylist() for name in names), strict=True)]
