"""The specification of a run, which the driver sends to its workers. Imports neither torch nor Ray Train."""

from dataclasses import dataclass

import pyarrow as pa
from ray.util.queue import Queue

from catsdogs.config import TrainConfig
from catsdogs.train.run_folder import RunFolder
from catsdogs.weights import PretrainedWeights


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """The specification of a run, the same for every worker.

    Attributes:
        train_files, validation_files: `LABELLED_FILES`.
        weights: of a run without a finished epoch; None for random ones.
        decode_cpus: reserved by each decoding task.
        ray_is_local: Ray ends with the command.
    """

    config: TrainConfig
    folder: RunFolder
    train_files: pa.Table
    validation_files: pa.Table
    weights: PretrainedWeights | None
    event_queue: Queue
    decode_cpus: float
    ray_is_local: bool = False
