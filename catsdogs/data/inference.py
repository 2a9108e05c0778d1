"""Listed files -> datasets of decoded batches for validation, evaluation and scoring."""

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from catsdogs import storage
from catsdogs.data.decode import PREFETCH_BATCHES, DecodeForInference, DecodeForTraining
from catsdogs.data.runtime import configure_ray_data
from catsdogs.schema import read_table

Stage = DecodeForInference | DecodeForTraining
BLOCK_ROWS = 256  # of files that one task reads and decodes, or one batch: those behind a slow read go on meanwhile


def split_into_blocks(files: pa.Table, batch_size: int) -> list[pa.Table]:
    """Cut listed files into blocks of whole batches; a model sees the same batches wherever they are labelled."""
    return _blocks(files, _block_rows(batch_size))


def _blocks(files: pa.Table, rows: int) -> list[pa.Table]:
    return [files.slice(start, rows) for start in range(0, files.num_rows, rows)]


def _block_rows(batch_size: int) -> int:
    return batch_size * max(1, BLOCK_ROWS // batch_size)


def _task_rows(stage: Stage) -> int:
    """Of files that one task takes: one batch where it has no known bytes, by which Ray Data tells batches apart."""
    return stage.batch_size if stage.gpu_jpegs else _block_rows(stage.batch_size)


def iter_decoded_batches(files: pa.Table, stage: Stage, num_cpus: float) -> Iterator[pa.Table]:
    """Read and decode files for a model in this process, in order and in batches."""
    if not files.num_rows:
        return
    DataContext.get_current().execution_options.preserve_order = True
    dataset = read_and_decode(files, stage, num_cpus)
    yield from dataset.iter_batches(
        batch_size=stage.batch_size, batch_format="pyarrow", prefetch_batches=PREFETCH_BATCHES
    )


def read_and_decode(files: pa.Table, stage: Stage, num_cpus: float) -> Dataset:
    """Read and decode listed files into a dataset whose blocks are batches."""
    configure_ray_data()
    return _decoded(ray.data.from_arrow(_blocks(files, _task_rows(stage))), stage, num_cpus)


def _decoded(files: Dataset, stage: Stage, num_cpus: float) -> Dataset:
    """Add the decoding stage to a dataset of listed files: a block in, its batches out as soon as they are decoded."""
    # Ray Data would put batches together.
    files.context.target_max_block_size = None if stage.gpu_jpegs else stage.batch_bytes - 1
    return files.map_batches(stage, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus)


class ManifestDatasource(Datasource):
    """Plans of shards, each read by one task, which cuts it into blocks: the same batches on every run.

    Not `read_parquet`: this reads through our own storage, which knows a store's trouble from a file's.
    """

    def __init__(self, uris: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._uris = uris

    def estimate_inmemory_data_size(self) -> int | None:
        """Leave it to the blocks that come."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Make one task a file."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_read_manifest, uri), unknown) for uri in self._uris]


def _read_manifest(uri: str) -> list[pa.Table]:
    return [read_table(storage.read_bytes(uri))]


def read_and_decode_manifests(uris: Sequence[str], stage: Stage, num_cpus: float) -> Dataset:
    """Stream the files that a plan's Parquet files list into a dataset as `decoded_files` does."""
    configure_ray_data()
    files: Dataset = ray.data.read_datasource(ManifestDatasource(uris), override_num_blocks=len(uris))
    return _decoded(files.repartition(target_num_rows_per_block=_task_rows(stage)), stage, num_cpus)
