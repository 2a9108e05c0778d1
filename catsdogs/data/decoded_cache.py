"""Cache decoded training images in Ray's object store, so that later epochs neither read nor decode them.

There is a cache only if the store has room for all images. Images larger than MAX_SIDE and files with a transient error
are not cached but read in every epoch. Ray decodes a block again if its machine is lost.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from catsdogs.data.decode import DecodeForInference, DecodeForTraining, FileResult, build_decoded_table, view_images
from catsdogs.data.decode_messages import NOT_CACHED, DecodeResult
from catsdogs.data.runtime import min_object_store_bytes
from catsdogs.images import MAX_PIXELS, Decoded, Preprocessing, decode_image
from catsdogs.progress import Progress, StageProgress
from catsdogs.schema import OK, RETRYABLE_STATUSES

MAX_SIDE = 512  # pixels
MAX_STORE_SHARE = 0.5  # of the smallest object store: any machine may fetch any block
DECODE_BATCH_SIZE = 32


@dataclass(frozen=True)
class DecodedCache:
    """Blocks of decoded images in row order; `ends` has for each block the row after its last."""

    blocks: tuple["ray.ObjectRef[pa.Table]", ...]
    ends: tuple[int, ...]

    def get(self, rows: Sequence[int]) -> list[Decoded | None]:
        """Look up images by row; None for those that are not cached."""
        starts, block_indices = (0, *self.ends), np.searchsorted(self.ends, rows, side="right").tolist()
        needed = sorted(set(block_indices))
        tables = dict(zip(needed, ray.get([self.blocks[i] for i in needed]), strict=True))
        return [_view_decoded(tables[i], row - starts[i]) for i, row in zip(block_indices, rows, strict=True)]


def cache_decoded(files: pa.Table, num_cpus: float, progress: Progress) -> DecodedCache | None:
    """Decode all training images on the whole cluster, in tasks of `num_cpus`. Return None if they may not fit."""
    if files.num_rows * MAX_SIDE * MAX_SIDE * 3 > MAX_STORE_SHARE * min_object_store_bytes():
        return None
    # Plain tasks, because a dataset would return its blocks all at once, without progress. Retries are unlimited,
    # because they also restore the blocks of lost machines.
    decode_block = ray.remote(_decode_block).options(
        num_cpus=num_cpus, num_returns=2, max_retries=-1, scheduling_strategy="SPREAD"
    )
    stage = _DecodeFullSize(Preprocessing(img_size=MAX_SIDE), MAX_PIXELS, DECODE_BATCH_SIZE)
    results: list[Any] = [decode_block.remote(stage, block) for block in stage.split_into_blocks(files)]
    ends: list[int] = []
    for _, num_rows in results:
        ends.append((ends[-1] if ends else 0) + ray.get(num_rows))
        progress(StageProgress("decode", ends[-1], files.num_rows))
    return DecodedCache(tuple(block for block, _ in results), tuple(ends))


def _decode_block(stage: DecodeForInference, files: pa.Table) -> tuple[pa.Table, int]:
    return pa.concat_tables(_drop_padding(batch) for batch in stage(files)), files.num_rows


@dataclass(frozen=True)
class AugmentCached:
    """Callable for map_batches with the output of `stage`, which reads and decodes only what is not cached."""

    decoded_cache: DecodedCache
    stage: DecodeForTraining

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Yield augmented batches."""
        for start in range(0, files.num_rows, self.stage.batch_size):
            yield self._augment_batch(files.slice(start, self.stage.batch_size))

    def _augment_batch(self, files: pa.Table) -> pa.Table:
        images = self.decoded_cache.get(files["row"].to_pylist())
        cached_N = np.array([image is not None for image in images], dtype=bool)
        tables = list(self.stage(files.filter(pa.array(~cached_N)))) if not cached_N.all() else []
        if cached_N.any():
            cached = [image for image in images if image is not None]
            tables.append(self._augment_cached(files.filter(pa.array(cached_N)), cached))
        order = np.argsort(np.concatenate([np.flatnonzero(~cached_N), np.flatnonzero(cached_N)]))
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables).take(pa.array(order))

    def _augment_cached(self, files: pa.Table, cached: Sequence[Decoded]) -> pa.Table:
        started = time.perf_counter()
        images_NHWC = np.zeros((files.num_rows, *self.stage.shape), dtype=np.uint8)
        for row, decoded, pixels in zip(files["row"].to_pylist(), cached, images_NHWC, strict=True):
            if decoded.image is not None:
                pixels[:] = self.stage.transform(decoded.image, row)
        seconds = (time.perf_counter() - started) / files.num_rows
        results = [DecodeResult(file.status, file.error, file.width, file.height, seconds) for file in cached]
        files_results = [FileResult(result, size_bytes=None, version=None, retries=0) for result in results]
        return build_decoded_table(files, files_results, images_NHWC, read_s=0.0)


class _DecodeFullSize(DecodeForInference):
    """Decodes files at their full size, up to MAX_SIDE; each row has the pixels, then padding."""

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        decoded = decode_image(image_bytes, self.max_pixels)
        if decoded.image is None:
            return decoded
        height, width, _ = decoded.image.shape
        if max(height, width) > MAX_SIDE:
            return Decoded(NOT_CACHED, None, None, None, None)
        padded = np.zeros((MAX_SIDE, MAX_SIDE, 3), dtype=np.uint8)
        padded.reshape(-1)[: decoded.image.size] = decoded.image.reshape(-1)
        return replace(decoded, image=padded, width=width, height=height)  # EXIF may swap the stored sides


def _drop_padding(rows: pa.Table) -> pa.Table:
    sides = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), rows["status"].to_pylist(), strict=True)
    sizes = [width * height * 3 if status == OK else 0 for width, height, status in sides]
    images = view_images(rows, MAX_SIDE).reshape(rows.num_rows, -1)
    pixels = pa.array([image[:size].tobytes() for image, size in zip(images, sizes, strict=True)], pa.large_binary())
    return rows.select(["status", "error", "width", "height"]).append_column("image", pixels)


def _view_decoded(rows: pa.Table, row: int) -> Decoded | None:
    """View one image of a block, without a copy."""
    status, error, width, height, pixels = (rows[name][row] for name in rows.column_names)
    if status.as_py() in (NOT_CACHED, *RETRYABLE_STATUSES):
        return None
    if status.as_py() != OK:
        return Decoded(status.as_py(), None, error.as_py(), width.as_py(), height.as_py())
    shape = (height.as_py(), width.as_py(), 3)
    return Decoded(OK, np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape), None, shape[1], shape[0])
