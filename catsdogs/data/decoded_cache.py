"""Training images, decoded once and held in Ray's object store: epochs neither read nor decode them again.

They are held where there is room for all of them. Those larger than SIDE, and those that may do better another time,
are read in every epoch. Ray decodes anew what a machine held that is gone.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from catsdogs.data.decode import DecodeForTraining, FileResult, build_decoded_table, decode_batches, view_images
from catsdogs.data.inference import split_into_blocks
from catsdogs.data.runtime import configure_ray_data, min_object_store_bytes
from catsdogs.data.sandbox import DecodeResult
from catsdogs.images import MAX_PIXELS, Decoded, decode
from catsdogs.progress import Progress, StageProgress
from catsdogs.schema import OK, RETRYABLE_STATUSES

MAX_SIDE = 512  # pixels
MAX_STORE_SHARE = 0.5  # of the smallest machine's object store, which any image may be asked of
DECODE_BATCH_SIZE = 32
NOT_CACHED = "not held"  # in place of a status


@dataclass(frozen=True)
class DecodedCache:
    """Blocks of decoded images in the order of their rows; `ends` has the row after the last of each."""

    blocks: tuple["ray.ObjectRef[pa.Table]", ...]
    ends: tuple[int, ...]

    def get(self, rows: Sequence[int]) -> list[Decoded | None]:
        """Look images up by row; None for one that is not held."""
        starts, places = (0, *self.ends), np.searchsorted(self.ends, rows, side="right").tolist()
        needed = sorted(set(places))
        tables = dict(zip(needed, ray.get([self.blocks[place] for place in needed]), strict=True))
        return [_decoded(tables[place], row - starts[place]) for place, row in zip(places, rows, strict=True)]


def cache_decoded(files: pa.Table, num_cpus: float, progress: Progress) -> DecodedCache | None:
    """Decode training images on the whole cluster; None where they may not fit.

    Args:
        files: all training rows, `LABELLED_FILES`.
        num_cpus: that each decoding task reserves.
    """
    if files.num_rows * MAX_SIDE * MAX_SIDE * 3 > MAX_STORE_SHARE * min_object_store_bytes():
        return None
    configure_ray_data()
    DataContext.get_current().execution_options.preserve_order = True
    dataset = ray.data.from_arrow(split_into_blocks(files, DECODE_BATCH_SIZE)).map_batches(
        _DecodeFullSize(), batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus
    )
    blocks: list[ray.ObjectRef[pa.Table]] = []
    ends: list[int] = []
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            blocks.append(entry.ref)
            ends.append((ends[-1] if ends else 0) + entry.metadata.num_rows)
            progress(StageProgress("decode", ends[-1], files.num_rows))
    return DecodedCache(tuple(blocks), tuple(ends))


@dataclass(frozen=True)
class AugmentCached:
    """A Ray Data stage: files -> what `stage` makes of them, in the same batches."""

    decoded_cache: DecodedCache
    stage: DecodeForTraining

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Augment what is held; read and decode the rest."""
        for start in range(0, files.num_rows, self.stage.batch_size):
            yield self._views(files.slice(start, self.stage.batch_size))

    def _views(self, files: pa.Table) -> pa.Table:
        found = self.decoded_cache.get(files["row"].to_pylist())
        held_N = np.array([image is not None for image in found], dtype=bool)
        tables = list(self.stage(files.filter(pa.array(~held_N)))) if not held_N.all() else []
        if held_N.any():
            tables.append(self._augmented(files.filter(pa.array(held_N)), [one for one in found if one is not None]))
        order = np.argsort(np.concatenate([np.flatnonzero(~held_N), np.flatnonzero(held_N)]))
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables).take(pa.array(order))

    def _augmented(self, files: pa.Table, found: Sequence[Decoded]) -> pa.Table:
        began = time.perf_counter()
        images_NHWC = np.zeros((files.num_rows, *self.stage.shape), dtype=np.uint8)
        for row, one, image in zip(files["row"].to_pylist(), found, images_NHWC, strict=True):
            if one.image is not None:
                image[:] = self.stage.views(one.image, row)
        seconds = (time.perf_counter() - began) / files.num_rows
        done = [
            FileResult(DecodeResult(one.status, one.error, one.width, one.height, seconds), None, None, 0)
            for one in found
        ]
        return build_decoded_table(files, done, images_NHWC, read_s=0.0)


@dataclass(frozen=True)
class _DecodeFullSize:
    """A Ray Data stage: files -> their pixels, `image` of as many bytes as it has; no bytes without one."""

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        for rows in decode_batches(files, DECODE_BATCH_SIZE, (MAX_SIDE, MAX_SIDE, 3), self):
            yield _drop_padding(rows)

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        """Decode a file; its pixels stand in front of those that fill up to SIDE x SIDE."""
        decoded = decode(image_bytes, MAX_PIXELS)
        if decoded.image is None:
            return decoded
        height, width, _ = decoded.image.shape
        if max(height, width) > MAX_SIDE:
            return Decoded(NOT_CACHED, None, None, None, None)
        filled = np.zeros((MAX_SIDE, MAX_SIDE, 3), dtype=np.uint8)
        filled.reshape(-1)[: decoded.image.size] = decoded.image.reshape(-1)
        return replace(decoded, image=filled, width=width, height=height)  # as it lies, not as the file says


def _drop_padding(rows: pa.Table) -> pa.Table:
    sides = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), rows["status"].to_pylist(), strict=True)
    sizes = [width * height * 3 if status == OK else 0 for width, height, status in sides]
    images = view_images(rows, MAX_SIDE).reshape(rows.num_rows, -1)
    pixels = pa.array([image[:size].tobytes() for image, size in zip(images, sizes, strict=True)], pa.large_binary())
    return rows.select(["status", "error", "width", "height"]).append_column("image", pixels)


def _decoded(rows: pa.Table, row: int) -> Decoded | None:
    """View an image in its block."""
    status, error, width, height, pixels = (rows[name][row] for name in rows.column_names)
    if status.as_py() in (NOT_CACHED, *RETRYABLE_STATUSES):
        return None
    if status.as_py() != OK:
        return Decoded(status.as_py(), None, error.as_py(), width.as_py(), height.as_py())
    shape = (height.as_py(), width.as_py(), 3)
    return Decoded(OK, np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape), None, shape[1], shape[0])
