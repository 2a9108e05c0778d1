"""What every training worker runs: epochs of steps, then validation, then the epoch is kept."""

import contextlib
import copy
import pickle
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist

from catsdogs import data, storage
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.metrics import MetricSums
from catsdogs.predict import VALIDATION_BATCH_SIZE
from catsdogs.progress import Message
from catsdogs.schema import OK, PREDICTIONS, parquet_bytes
from catsdogs.train.features import FeatureInputs
from catsdogs.train.image_inputs import ImageInputs
from catsdogs.train.run_folder import LEFT_OUT, Best, EpochRow
from catsdogs.train.step import learning_rate
from catsdogs.train.worker import (
    MAX_NAMED_IMAGES,
    EpochFinished,
    FatalError,
    Inputs,
    LeftOut,
    RunSpec,
    Started,
    TrainWorker,
    build_worker,
)

HEAD_SAVE_INTERVAL_S = 10.0  # between writes of a head's epochs, each of which is a fraction of a second


def train_loop_per_worker(loop_config: dict[str, ray.ObjectRef[RunSpec]]) -> None:
    """Train from the last finished epoch to the last; what Ray Train starts on each worker."""
    spec = ray.get(loop_config["spec"])
    try:
        data.warm_up_decoder(spec.decode_cpus)  # while this process builds its model
        with data.without_cluster_actors() if spec.on_local_ray else contextlib.nullcontext():
            _train(build_worker(spec))
    except Exception as error:
        reason = Message(f"worker {ray.train.get_context().get_world_rank()}: {type(error).__name__}: {error}")
        spec.events.put(pickle.dumps(reason))
        raise


def _train(worker: TrainWorker) -> None:
    config = worker.spec.config
    worker.send_event(Started(list(worker.history.rows), worker.precision, worker.device.type))
    if worker.history.epoch == config.epochs:
        return
    frozen = config.freeze == "backbone"
    inputs: Inputs = FeatureInputs(worker) if frozen else ImageInputs(worker)
    writer = CheckpointWriter(worker, HEAD_SAVE_INTERVAL_S if frozen else 0.0)
    for epoch in range(worker.history.epoch + 1, config.epochs + 1):
        started = time.monotonic()
        trained = train_epoch(worker, inputs, epoch)
        if refusal := _check_fatal(trained, epoch, config.peak_lr):  # on every worker alike
            worker.send_event(FatalError(refusal))
            return
        seconds = time.monotonic() - started
        validation, rows = validate(worker, inputs, epoch)
        row: EpochRow = {
            "epoch": epoch,
            "train_loss": float(trained[0] / trained[2]),
            "train_accuracy": float(trained[1] / trained[2]),
            "val_loss": validation.mean_loss,
            "val_accuracy": validation.accuracy,
            "lr": learning_rate(config, epoch * worker.plan.num_steps - 1, worker.plan.num_steps),
            "images_per_s": float(trained[2] / seconds),
            "seconds": time.monotonic() - started,
        }
        writer.save(row, rows)
        if not frozen or epoch == config.epochs:  # a report takes longer than an epoch of a head
            ray.train.report(row)


def _check_fatal(trained: np.ndarray[Any, np.dtype[np.float64]], epoch: int, lr: float) -> CatsdogsError | None:
    if not trained[2]:
        return InputError("no training image can be decoded; check --data-dir")
    if not np.isfinite(trained[0]):
        return RunError(f"the loss is not finite in epoch {epoch}: start a new run with a lower --lr than {lr:g}")
    return None


def train_epoch(worker: TrainWorker, inputs: Inputs, epoch: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Take every step of an epoch.

    Returns:
        float64 (3,): cross-entropy summed, rows right, rows; over all workers.
    """
    plan, config = worker.plan, worker.spec.config
    totals = torch.zeros(3, dtype=torch.float64, device=worker.device)
    for step, (inputs_N, targets_N) in enumerate(inputs.batches(epoch)):
        lr = learning_rate(config, (epoch - 1) * plan.num_steps + step, plan.num_steps)
        totals += worker.train_step.step(inputs_N, targets_N, lr)
        seen = min((step + 1) * plan.global_batch_size, plan.num_rows)
        worker.send_progress("train", seen, plan.num_rows, f"epoch {epoch}/{config.epochs}")
    if worker.world_size > 1:
        dist.all_reduce(totals)
    _report_left_out(worker)
    return np.asarray(totals.cpu().numpy())


def _report_left_out(worker: TrainWorker) -> None:
    """Name the training images that were left out, each once."""
    gathered = _gather(worker, worker.left_out) or []
    new = {path: why for part in gathered for path, why in part.items() if path not in worker.reported_left_out}
    worker.left_out = {}
    if new:
        worker.reported_left_out |= new
        rows = [
            {"path": path, "status": why[0], "error": why[1]} for path, why in sorted(worker.reported_left_out.items())
        ]
        storage.write_bytes(worker.spec.folder.path(LEFT_OUT), parquet_bytes(pa.Table.from_pylist(rows)))
        worker.send_event(LeftOut([(path, *why) for path, why in sorted(new.items())]))


def validate(worker: TrainWorker, inputs: Inputs, epoch: int) -> tuple[MetricSums, pa.Table | None]:
    """Label every validation row, once over all workers.

    Returns:
        The sums over all rows, and on the first worker the rows sorted by path.
    """
    if worker.world_size > 1:  # BatchNorm's statistics are per worker; the first one's count
        for buffer in worker.model.buffers():
            dist.broadcast(buffer, 0)
    tables = list(_predicted(worker, inputs, epoch))
    own = pa.concat_tables(tables) if tables else PREDICTIONS.empty_table()
    class_names = worker.spec.folder.class_names
    vector = torch.tensor(MetricSums.from_predictions(own, class_names).vector(), device=worker.device)
    if worker.world_size > 1:
        dist.all_reduce(vector)
    gathered = _gather(worker, own)
    rows = pa.concat_tables(gathered).sort_by("path") if gathered is not None else None
    if rows is not None and not worker.reported_failed:
        worker.reported_failed = True
        _report_failed(worker, rows)
    return MetricSums.from_vector(vector.cpu().numpy(), len(class_names)), rows


def _report_failed(worker: TrainWorker, rows: pa.Table) -> None:
    """Name the validation images that could not be decoded, once a start."""
    failed = [row for row in rows.select(["path", "status", "error"]).to_pylist() if row["status"] != OK]
    if failed:
        worker.send_event(Message(f"{len(failed)} validation images have no label and count as wrong"))
    for row in failed[:MAX_NAMED_IMAGES]:
        worker.send_event(Message(f"  {row['path']}: {row['status']}, {row['error']}"))


def _predicted(worker: TrainWorker, inputs: Inputs, epoch: int) -> Iterator[pa.Table]:
    for i, rows in enumerate(inputs.predict_validation()):
        yield rows
        done = (i + 1) * VALIDATION_BATCH_SIZE * worker.world_size
        worker.send_progress(
            "validate", done, worker.validation_files.num_rows, f"epoch {epoch}/{worker.spec.config.epochs}"
        )


def _gather(worker: TrainWorker, value: Any) -> list[Any] | None:
    """Bring every worker's value to the first one; None elsewhere."""
    if worker.world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * worker.world_size if worker.rank == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


class CheckpointWriter:
    """Counts finished epochs; on the first worker it writes them, where they are seconds long not every one."""

    def __init__(self, worker: TrainWorker, every_s: float) -> None:
        self._worker = worker
        self._every_s = every_s
        self._wrote_at = time.monotonic()
        self._num_kept = worker.history.epoch
        self._best: Best | None = None

    def save(self, row: EpochRow, rows: pa.Table | None) -> None:
        """Finish an epoch; `rows` are the validation's, None but on the first worker."""
        worker, history = self._worker, self._worker.history
        history.rows.append(row)
        if rows is None:
            return
        if history.best_epoch == history.epoch:
            self._best = Best(copy.deepcopy(worker.model), rows)
        if history.epoch == worker.spec.config.epochs or time.monotonic() - self._wrote_at >= self._every_s:
            worker.spec.folder.save_epoch(history, worker.model, worker.train_step.optimizer, self._best)
            self._best, self._wrote_at, self._num_kept = None, time.monotonic(), history.epoch
        worker.send_event(EpochFinished(list(history.rows), self._num_kept))
