"""Datasets of decoded batches, for validation, evaluation, scoring and the epochs of training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from catsdogs import storage
from catsdogs.data.blocks import find_block_rows, join_batches, pack_block, split_files, unpack_blocks
from catsdogs.data.decode import PREFETCH_BATCHES, DecodeForInference, DecodeForTraining, view_images
from catsdogs.data.runtime import allocate_cpus, configure_ray_data
from catsdogs.images import MAX_PIXELS, ImageArray, Preprocessing
from catsdogs.schema import OK, read_table

RowIndices = np.ndarray[Any, np.dtype[np.int64]]
THUMBNAIL = Preprocessing(img_size=160, crop_pct=1.0)  # for reports
FEW_IMAGES = 32  # of a batch of `decode_images`
MIN_BLOCKS_PER_DECODER = 4  # so that the last blocks of a dataset keep all CPUs busy


def iter_decoded_batches(files: pa.Table, stage: DecodeForInference, num_cpus: float) -> Iterator[pa.Table]:
    """Yield decoded batches, in order, for a model in this process."""
    if files.num_rows:
        decoded = read_and_decode(files, stage, num_cpus, ordered=True)
        decoded.set_name("decode")  # in Ray's dashboard
        yield from decoded.iter_batches(
            batch_size=stage.batch_size, batch_format="pyarrow", prefetch_batches=PREFETCH_BATCHES
        )


def decode_images(paths: Iterable[str], preprocessing: Preprocessing) -> dict[str, ImageArray]:
    """Decode a few images in one task, where all others are decoded; leave out those that fail."""
    images: dict[str, ImageArray] = {}
    for rows in decode_in_task(dict.fromkeys(paths), DecodeForInference(preprocessing, MAX_PIXELS, FEW_IMAGES)):
        ok_N = np.asarray(pc.equal(rows["status"], OK))
        names = rows["path"].filter(pa.array(ok_N)).to_pylist()
        images |= zip(names, view_images(rows, preprocessing.img_size)[ok_N], strict=True)
    return images


def decode_in_task(paths: Iterable[str], stage: DecodeForInference) -> list[pa.Table]:
    """Run a stage on a few files in one task; return its batches."""
    files = storage.build_files_table(storage.Entry(path) for path in paths)
    decode = ray.remote(_decode_files).options(num_cpus=allocate_cpus(1).decode, name="decode examples")
    batches: list[pa.Table] = ray.get(decode.remote(stage, files))
    return batches


def _decode_files(stage: DecodeForInference, files: pa.Table) -> list[pa.Table]:
    return list(stage(files))


def read_and_decode(files: pa.Table, stage: DecodeForInference, num_cpus: float, ordered: bool = False) -> Dataset:
    """Build a dataset of decoded files; its blocks are batches, or large blocks that are packed."""
    if stage.large_blocks:
        blocks = [pack_block(block) for block in split_files(files, stage.batch_size, _min_blocks(num_cpus))]
    else:
        blocks = stage.split_into_blocks(files)
    return _decode(configure_ray_data(ray.data.from_arrow(blocks), ordered), stage, num_cpus)


def _min_blocks(num_cpus: float) -> int:
    num_decoders: float = ray.cluster_resources().get("CPU", 1) / num_cpus
    return math.ceil(MIN_BLOCKS_PER_DECODER * num_decoders)


def _decode(files: Dataset, stage: DecodeForInference, num_cpus: float) -> Dataset:
    """Add the decoding stage, which yields the batches of a block one by one, or joined to large blocks."""
    # Ray Data merges what a stage yields into one block up to this size. One byte less than a batch; of packed blocks
    # any number exceeds it.
    files.context.target_max_block_size = 1 if stage.large_blocks else stage.batch_bytes - 1
    decode: Callable[[pa.Table], Iterator[pa.Table]] = DecodePacked(stage) if stage.large_blocks else stage
    return files.map_batches(decode, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus)


@dataclass(frozen=True)
class DecodePacked:
    """Callable for map_batches that decodes files to packed blocks of rows.

    Its block is a packed block of files, or a row that says which rows of a manifest they are.
    """

    stage: DecodeForInference

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        is_slice = "manifest" in block.column_names
        for files in _read_slice(block, self.stage.batch_size) if is_slice else unpack_blocks(block):
            for rows in join_batches(self.stage(files)):
                yield pack_block(rows)


def _slice_manifest(uri: str, num_rows: int, max_rows: int) -> list[pa.Table]:
    starts = range(0, num_rows, max_rows)
    return [pa.table({"manifest": [uri], "start": [start], "max_rows": [max_rows]}) for start in starts]


def _read_slice(block: pa.Table, batch_size: int) -> list[pa.Table]:
    (row,) = block.to_pylist()
    files = _read_manifest(row["manifest"]).slice(row["start"], row["max_rows"])
    return split_files(files, batch_size, min_blocks=1)


class ManifestDatasource(Datasource):
    """Manifests, the Parquet files that list the images of a shard; each is read by one task.

    Unlike `read_parquet`, it reads through `storage`, which distinguishes a failure of the store from a damaged file.
    """

    def __init__(self, uris: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._uris = uris

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_read_manifests, [uri]), unknown) for uri in self._uris]


def _read_manifests(uris: Sequence[str]) -> list[pa.Table]:
    return [_read_manifest(uri) for uri in uris]


def _read_manifest(uri: str) -> pa.Table:
    return read_table(storage.read_bytes(uri))


def read_and_decode_manifests(manifests: Mapping[str, int], stage: DecodeForInference, num_cpus: float) -> Dataset:
    """Build a dataset as `read_and_decode` does, of the files that manifests list.

    Args:
        manifests: the number of files of each, by URI.
    """
    if not stage.large_blocks:
        listed: Dataset = ray.data.read_datasource(ManifestDatasource([*manifests]), override_num_blocks=len(manifests))
        files = configure_ray_data(listed).repartition(target_num_rows_per_block=stage.block_rows)
        return _decode(files, stage, num_cpus)
    # The decoding tasks read the manifests: other tasks for it would cost the driver as much again.
    min_blocks = -(-_min_blocks(num_cpus) // len(manifests))
    slices: list[pa.Table] = []
    for uri, num_rows in manifests.items():
        slices += _slice_manifest(uri, num_rows, find_block_rows(num_rows, stage.batch_size, min_blocks))
    return _decode(configure_ray_data(ray.data.from_arrow(slices)), stage, num_cpus)


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Assigns training rows to steps and workers, every row once per epoch.

    Step s has rows s*G to (s+1)*G of a permutation, where G is the global batch size. Workers split the rows of a step
    evenly, so the rows of a global batch do not depend on the number of workers.
    """

    num_rows: int
    seed: int
    batch_size: int
    rank: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Rows of a full step, over all workers."""
        return self.batch_size * self.world_size

    @property
    def num_steps(self) -> int:
        """Steps per epoch, the same for every worker. The last may have fewer rows."""
        return -(-self.num_rows // self.global_batch_size)

    def steps(self, epoch: int) -> list[RowIndices]:
        """Return this worker's rows of each step. In the last step there may be none."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        starts = range(0, self.num_rows, self.global_batch_size)
        return [np.array_split(order[s : s + self.global_batch_size], self.world_size)[self.rank] for s in starts]


def iter_epoch_batches(
    files: pa.Table, steps: Sequence[RowIndices], stage: DecodeForTraining, num_cpus: float
) -> Iterator[pa.Table]:
    """Read, decode and augment the rows of one epoch; yield one batch per step.

    Args:
        files: all training rows, `LABELLED_FILES`.
        steps: the rows of each step, at least one and at most `stage.batch_size`.
        num_cpus: reserved by each decoding task.
    """
    if not steps:
        return
    blocks = [files.take(pa.array(rows)).append_column("row", pa.array(rows)) for rows in steps]
    dataset = configure_ray_data(ray.data.from_arrow(blocks), preserve_order=True)
    dataset.context.target_max_block_size = 2 * stage.batch_bytes  # so that Ray Data does not split a batch
    dataset = dataset.map_batches(
        stage, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus
    )
    dataset.set_name("train")  # in Ray's dashboard
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH_BATCHES)
