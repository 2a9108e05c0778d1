"""Listed files -> datasets of decoded batches for validation, evaluation and scoring."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset

from catsdogs import storage
from catsdogs.data.decode import PREFETCH, DecodeForInference
from catsdogs.data.runtime import quiet_datasets


def inference_batches(files: pa.Table, batch_size: int) -> list[pa.Table]:
    """Cut listed files into the batches that a model sees; the same wherever they are labelled."""
    return [files.slice(start, batch_size) for start in range(0, files.num_rows, batch_size)]


def decoded_batches(blocks: Sequence[pa.Table], stage: DecodeForInference, num_cpus: float) -> Iterator[pa.Table]:
    """Read and decode batches for a model in this process, in order."""
    if not blocks:
        return
    quiet_datasets()
    DataContext.get_current().execution_options.preserve_order = True
    dataset = decode_blocks(ray.data.from_arrow(list(blocks)), stage, num_cpus)
    yield from dataset.iter_batches(batch_size=blocks[0].num_rows, batch_format="pyarrow", prefetch_batches=PREFETCH)


def decode_blocks(files: Dataset, stage: DecodeForInference, num_cpus: float) -> Dataset:
    """Add the decoding stage to a dataset of listed files; a block in, a block out."""
    return files.map_batches(stage, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus)


def manifest_dataset(paths: Sequence[str], batch_size: int) -> Dataset:
    """Stream listed files from a plan's Parquet files in blocks of one batch."""
    filesystem = storage.arrow_filesystem(paths[0])
    dataset = ray.data.read_parquet(
        [storage.fs_path(path) for path in paths],
        filesystem=filesystem,
        partitioning=None,  # an output folder may be called day=1
    )
    return dataset.repartition(target_num_rows_per_block=batch_size)
