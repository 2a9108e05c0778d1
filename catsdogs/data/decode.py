"""Listed files -> rows of uint8 pixels. Shapes: N rows, S pixels a side."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.data.sandbox import Answer, Decoder, File, decode_apart
from catsdogs.images import Decoded, Pixels, Preprocessing, augment, decode
from catsdogs.schema import OK

PREFETCH = 4  # decoded batches that wait for the model


@dataclass(frozen=True)
class DecodeForInference:
    """A Ray Data stage: files -> the model's view of them."""

    preprocessing: Preprocessing
    max_pixels: int

    def __call__(self, files: pa.Table) -> pa.Table:
        """Read and decode one block of files; every file stays a row."""
        return _decode_rows(files, self.preprocessing.img_size, self)

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        """Decode one file to the model's view, uint8 (S, S, 3)."""
        decoded = decode(image_bytes, self.max_pixels)
        return decoded if decoded.image is None else replace(decoded, image=self.preprocessing(decoded.image))


@dataclass(frozen=True)
class DecodeForTraining:
    """A Ray Data stage: files -> augmented pixels, random by seed, epoch and row alone."""

    preprocessing: Preprocessing
    max_pixels: int
    kind: str
    seed: int
    epoch: int

    def __call__(self, files: pa.Table) -> pa.Table:
        """Read, decode and augment one block of files; every file stays a row."""
        return _decode_rows(files, self.preprocessing.img_size, self, files["row"].to_pylist())

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode one file and augment it, uint8 (S, S, 3)."""
        decoded = decode(image_bytes, self.max_pixels)
        return decoded if decoded.image is None else replace(decoded, image=self._augmented(decoded.image, row))

    def _augmented(self, image: Pixels, row: int) -> Pixels:
        if self.kind == "none":
            return self.preprocessing(image)
        rng = np.random.default_rng([self.seed, self.epoch, row])
        return augment(image, self.kind, self.preprocessing.img_size, rng)


def images_of(rows: pa.Table, img_size: int) -> Pixels:
    """View the pixels of decoded rows, uint8 (N, S, S, 3); read-only."""
    column = rows["image"].combine_chunks() if isinstance(rows["image"], pa.ChunkedArray) else rows["image"]
    pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    row_bytes = img_size * img_size * 3
    start = column.offset * row_bytes
    return pixels[start : start + len(column) * row_bytes].reshape(len(column), img_size, img_size, 3)


def _decode_rows(files: pa.Table, img_size: int, decoder: Decoder, rows: Sequence[int] | None = None) -> pa.Table:
    began = time.perf_counter()
    fetched = storage.fetch(_entries(files))
    read_s = (time.perf_counter() - began) / max(1, files.num_rows)
    images_NSSC = np.zeros((files.num_rows, img_size, img_size, 3), dtype=np.uint8)
    numbered = zip(fetched, rows or range(files.num_rows), images_NSSC, strict=True)
    found = [File(file.image_bytes, row, pixels) for file, row, pixels in numbered if file.image_bytes is not None]
    answers = iter(decode_apart(decoder, found))
    decoded = [
        next(answers) if file.status == OK else Answer(file.status, file.error, None, None, 0.0) for file in fetched
    ]
    sizes = [None if file.image_bytes is None else len(file.image_bytes) for file in fetched]
    image_type = pa.binary(img_size * img_size * 3)
    columns = {  # a manifest knows neither size nor version
        "size_bytes": pc.coalesce(files["size_bytes"], pa.array(sizes, pa.int64())),
        "version": pc.coalesce(pa.array([file.version for file in fetched], pa.string()), files["version"]),
        "status": pa.array([row.status for row in decoded], pa.string()),
        "error": pa.array([row.error for row in decoded], pa.string()),
        "width": pa.array([row.width for row in decoded], pa.int32()),
        "height": pa.array([row.height for row in decoded], pa.int32()),
        "retries": pa.array([file.retries for file in fetched], pa.int32()),
        "read_s": pa.array(np.full(files.num_rows, read_s, dtype=np.float32)),
        "decode_s": pa.array([row.decode_s for row in decoded], pa.float32()),
        "image": pa.Array.from_buffers(image_type, files.num_rows, [None, pa.py_buffer(images_NSSC)]),
    }
    kept = files.drop_columns(["size_bytes", "version"])
    return pa.table({**{name: kept[name] for name in kept.column_names}, **columns})


def _entries(files: pa.Table) -> list[storage.Entry]:
    names = ("path", "size_bytes", "version")
    return [storage.Entry(*values) for values in zip(*(files[name].to_pylist() for name in names), strict=True)]
