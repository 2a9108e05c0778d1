"""One epoch's rows of one training worker, in an order that seed and epoch alone decide."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext

from catsdogs.data.decode import PREFETCH_BATCHES, DecodeForTraining
from catsdogs.data.decoded_cache import AugmentCached, DecodedCache
from catsdogs.data.runtime import configure_ray_data
from catsdogs.images import MAX_PIXELS, Preprocessing

RowIndices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which rows a worker sees in which step: every row once an epoch, by one worker.

    Step s of an epoch takes rows s*G to (s+1)*G of a permutation, G the global batch; workers share a step's rows
    evenly, so the rows of a global batch do not depend on the number of workers.
    """

    num_rows: int
    seed: int
    batch_size: int
    rank: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Rows of a full step over all workers."""
        return self.batch_size * self.world_size

    @property
    def num_steps(self) -> int:
        """Steps an epoch, the same for every worker; the last may be smaller."""
        return -(-self.num_rows // self.global_batch_size)

    def steps(self, epoch: int) -> list[RowIndices]:
        """List this worker's rows of each step; those of the last step may be none."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        starts = range(0, self.num_rows, self.global_batch_size)
        return [np.array_split(order[s : s + self.global_batch_size], self.world_size)[self.rank] for s in starts]

    def global_rows(self, step: int) -> int:
        """Count the rows of a step over all workers."""
        return min(self.global_batch_size, self.num_rows - step * self.global_batch_size)


def iter_epoch_batches(
    files: pa.Table,
    plan: EpochPlan,
    epoch: int,
    preprocessing: Preprocessing,
    kind: str,
    num_cpus: float,
    decoded_cache: DecodedCache | None = None,
) -> Iterator[pa.Table]:
    """Read, decode and augment a worker's rows of one epoch, a batch a step.

    Args:
        files: all training rows, `LABELLED_FILES`.
        num_cpus: that each decoding task reserves.
        held: where the images are decoded already.
    """
    steps = [rows for rows in plan.steps(epoch) if len(rows)]
    if not steps:
        return
    configure_ray_data()
    DataContext.get_current().execution_options.preserve_order = True
    blocks = [files.take(pa.array(rows)).append_column("row", pa.array(rows)) for rows in steps]
    stage = DecodeForTraining(preprocessing, MAX_PIXELS, plan.batch_size, kind, plan.seed, (epoch,))
    # A decoder's failure is a row, so a stage that raises has a bug or lost its store: the job ends.
    dataset = ray.data.from_arrow(blocks).map_batches(
        stage if decoded_cache is None else AugmentCached(decoded_cache, stage),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=num_cpus,
    )
    yield from dataset.iter_batches(
        batch_size=plan.batch_size, batch_format="pyarrow", prefetch_batches=PREFETCH_BATCHES
    )
