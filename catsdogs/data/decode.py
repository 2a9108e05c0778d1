"""Listed files -> rows of uint8 pixels. Shapes: N rows, S pixels a side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.images import Decoded, Preprocessing, augment, decode
from catsdogs.schema import OK

PREFETCH = 4  # decoded batches that wait for the model
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True)
class DecodeForInference:
    """A Ray Data stage: files -> the model's view of them."""

    preprocessing: Preprocessing
    max_pixels: int

    def __call__(self, files: pa.Table) -> pa.Table:
        """Read and decode one block of files; every file stays a row."""
        return _decode_rows(
            files, self.preprocessing.img_size, self.max_pixels, lambda image, _: self.preprocessing(image)
        )


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
        rows = files["row"].to_numpy()
        return _decode_rows(
            files,
            self.preprocessing.img_size,
            self.max_pixels,
            lambda image, i: self._augmented(image, int(rows[i])),
        )

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


def _decode_rows(
    files: pa.Table, img_size: int, max_pixels: int, to_pixels: Callable[[Pixels, int], Pixels]
) -> pa.Table:
    images_NSSC = np.zeros((files.num_rows, img_size, img_size, 3), dtype=np.uint8)
    contents = storage.fetch(_entries(files))
    decoded = [_decode_one(fetched, max_pixels) for fetched in contents]
    for i, row in enumerate(decoded):
        if row.image is not None:
            images_NSSC[i] = to_pixels(row.image, i)
    pixels = pa.Array.from_buffers(
        pa.binary(img_size * img_size * 3), files.num_rows, [None, pa.py_buffer(images_NSSC)]
    )
    columns: dict[str, Any] = {
        "status": pa.array([row.status for row in decoded], pa.string()),
        "error": pa.array([row.error for row in decoded], pa.string()),
        "width": pa.array([row.width for row in decoded], pa.int32()),
        "height": pa.array([row.height for row in decoded], pa.int32()),
        "image": pixels,
    }
    sizes = [None if fetched.image_bytes is None else len(fetched.image_bytes) for fetched in contents]
    size_bytes = pc.coalesce(files["size_bytes"], pa.array(sizes, pa.int64()))  # a manifest does not know them
    files = files.set_column(files.schema.get_field_index("size_bytes"), "size_bytes", size_bytes)
    for name, column in columns.items():
        files = files.append_column(name, column)
    return files.drop_columns(["version"])


def _decode_one(fetched: storage.Fetched, max_pixels: int) -> Decoded:
    if fetched.status != OK or fetched.image_bytes is None:
        return Decoded(status=fetched.status, image=None, error=fetched.error, width=None, height=None)
    try:
        return decode(fetched.image_bytes, max_pixels)
    except MemoryError:
        return Decoded(status="decoder_crash", image=None, error="out of memory", width=None, height=None)


def _entries(files: pa.Table) -> list[storage.Entry]:
    names = ("path", "size_bytes", "version")
    return [storage.Entry(*values) for values in zip(*(files[name].to_pylist() for name in names), strict=True)]
