"""The training loop of a worker, which Ray Train runs.

driver.train                            driver.py        lists the labelled files, starts the workers
└── train_loop_per_worker               trainer.py       imports this module, which needs torch
    ├── build_worker                    worker.py        device, model, optimizer, the training state to resume from
    ├── build_inputs                                     images, or features of a frozen backbone
    └── for each epoch:
        ├── train_epoch
        │   ├── iter_batches            inputs.py        read, decode and augment (data/datasets.py, data/decode.py)
        │   │                           resident.py      on a GPU: augment images that are in its memory
        │   │                           features.py
        │   ├── compute_learning_rate   model.py
        │   ├── train_step                               zero_grad, forward, loss, backward, clip, optimizer step
        │   │                           graph.py         on one GPU: the whole step as a CUDA graph
        │   └── save_if_due             step_saver.py    every --save-every seconds: last/step_state.pt, in a thread
        ├── validate                    inputs.py        predict the validation rows (predict.py), sum over workers
        │                               features.py
        └── save_checkpoint             run_folder.py    best/, last/, summary.csv, last/training_state.pt

Shapes: N batch, K classes.
"""

import math
import time
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import ray.train
import torch
import torch.nn.functional as F
from torch import nn

from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.metrics import MetricSums
from catsdogs.predict import VALIDATION_BATCH_SIZE
from catsdogs.progress import report_failed_rows
from catsdogs.schema import PREDICTIONS
from catsdogs.train.events import EpochFinished, Started, TrainingFailed
from catsdogs.train.features import FeatureInputs, find_or_compute_features
from catsdogs.train.graph import Batch, GraphedStep, Step, capture_graph
from catsdogs.train.inputs import ImageInputs
from catsdogs.train.model import (
    Forward,
    compute_class_weights,
    compute_learning_rate,
    describe_class_weights,
    set_learning_rate,
)
from catsdogs.train.run_folder import CheckpointWriter, EpochRow, History
from catsdogs.train.step_saver import StepSaver
from catsdogs.train.step_state import EpochProgress
from catsdogs.train.worker import Ranks, TrainWorker

Inputs = ImageInputs | FeatureInputs

HEAD_SAVE_INTERVAL_S = 10.0  # with a frozen backbone, an epoch takes under 1 s, about as long as saving it


class EpochTotals(NamedTuple):
    """Sums over the training rows of an epoch, of all workers."""

    loss: float  # cross-entropy without label smoothing
    num_correct: float
    num_rows: float
    seconds: float


def train_epochs(worker: TrainWorker) -> None:
    """Train, validate and save the remaining epochs."""
    config, num_steps = worker.spec.config, worker.plan.num_steps
    first_epoch = worker.history.epoch + 1
    worker.events.send(Started(worker.history, worker.precision, worker.device.type, worker.progress.num_steps))
    if is_finished(worker.history, config):
        return
    inputs, step = build_inputs(worker), build_step(worker)
    interval_s = min(HEAD_SAVE_INTERVAL_S, config.save_every) if config.freeze == "backbone" else 0.0
    writer = CheckpointWriter(worker.spec.folder, worker.saved_files, worker.history.epoch, interval_s)
    saver = StepSaver(worker, writer, inputs.left_out)
    progress = worker.progress
    for epoch in range(first_epoch, config.epochs + 1):
        started = time.monotonic() - progress.seconds
        totals = train_epoch(worker, inputs, step, epoch, progress, saver)
        progress = EpochProgress()
        if error := check_totals(totals, epoch, config):  # identical on every worker, so all return
            worker.events.send(TrainingFailed(error))
            return
        metrics, predictions = validate(worker, inputs, epoch)
        if epoch == first_epoch and predictions is not None:
            text = "validation images were not classified and count as incorrect"
            report_failed_rows(predictions, text, worker.events.send)
        row: EpochRow = {
            "epoch": epoch,
            "train_loss": totals.loss / totals.num_rows,
            "train_accuracy": totals.num_correct / totals.num_rows,
            "val_loss": metrics.mean_loss,
            "val_accuracy": metrics.accuracy,
            "lr": compute_learning_rate(config, epoch * num_steps - 1, num_steps),
            "images_per_s": totals.num_rows / totals.seconds,
            "seconds": time.monotonic() - started,
        }
        save_checkpoint(worker, writer, saver, row, predictions)
        is_last = is_finished(worker.history, config)
        if interval_s == 0 or is_last:  # a report may take longer than an epoch of a head
            ray.train.report(row)
        if is_last:
            break
    if worker.history.epoch < config.epochs:
        worker.events.send_text(f"stopped: no lower validation loss for {config.patience} epochs (--patience)")


def is_finished(history: History, config: TrainConfig) -> bool:
    """Return whether no epoch remains: all are finished, or too many had no lower validation loss."""
    is_exhausted = config.patience is not None and history.num_without_improvement >= config.patience
    return is_exhausted or history.epoch >= config.epochs


def build_inputs(worker: TrainWorker) -> Inputs:
    """Build the inputs of training and validation; for a frozen backbone, compute its features once."""
    if worker.spec.config.freeze == "none":
        return ImageInputs(worker)
    return FeatureInputs(worker, find_or_compute_features(worker))


def build_step(worker: TrainWorker) -> Step:
    """Bind `train_step` to the worker; on one GPU, it becomes a CUDA graph."""
    config, ranks = worker.spec.config, worker.ranks
    weights_K = None
    if config.class_weights == "auto":
        weights_K = compute_class_weights(worker.spec.train_files["true_index"].to_numpy()).to(worker.device)
        worker.events.send_text(describe_class_weights(weights_K.tolist(), worker.spec.folder.class_names))
    step = partial(
        train_step, worker.train_model, worker.optimizer, config=config, ranks=ranks, class_weights_K=weights_K
    )
    if worker.device.type != "cuda" or ranks.world_size > 1:
        return step
    return GraphedStep(step, worker.optimizer, worker.plan.batch_size, worker.events.send_text, capture_graph)


def train_epoch(
    worker: TrainWorker, inputs: Inputs, step: Step, epoch: int, progress: EpochProgress, saver: StepSaver
) -> EpochTotals:
    """Run the training steps of an epoch that remain.

    Args:
        progress: the steps that were taken before the run was resumed.
    """
    config, plan = worker.spec.config, worker.plan
    started = time.monotonic() - progress.seconds
    sums = torch.tensor(progress.sums, dtype=torch.float64, device=worker.device) * worker.ranks.is_first
    batches = inputs.iter_batches(epoch, progress.num_steps)
    for num_steps, batch in enumerate(batches, start=progress.num_steps + 1):
        lr = compute_learning_rate(config, (epoch - 1) * plan.num_steps + num_steps - 1, plan.num_steps)
        set_learning_rate(worker.optimizer, lr, worker.device)
        sums += step(batch)
        saver.save_if_due(epoch, num_steps, sums, time.monotonic() - started)
        num_done = min(num_steps * plan.global_batch_size, plan.num_rows)
        worker.events.send_progress("train", num_done, plan.num_rows, f"epoch {epoch}/{config.epochs}")
    loss, num_correct, num_rows = worker.ranks.all_reduce(sums).tolist()
    seconds = time.monotonic() - started
    inputs.left_out.report(worker)
    return EpochTotals(loss, num_correct, num_rows, seconds)


def train_step(
    model: Forward,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    ranks: Ranks,
    class_weights_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one optimizer step on this worker's rows of a global batch.

    It does not wait for the device, unless a worker has no rows: a CUDA graph can replay it.

    Args:
        class_weights_K: float32, on the device; the loss is the mean over the rows, weighted by their classes.

    Returns:
        float64 (3,): over this worker's rows, the sum of the cross-entropy, the correct rows, the rows.
    """
    inputs, targets_N = batch
    num_rows, device = len(targets_N), targets_N.device
    weight = (
        torch.full((), float(num_rows), device=device) if class_weights_K is None else class_weights_K[targets_N].sum()
    )
    global_weight = ranks.all_reduce(weight)
    if num_rows == 0:
        if global_weight.item() == 0:  # no image of the global batch could be decoded
            return torch.zeros(3, dtype=torch.float64, device=device)
        # Dummy batch of one row, so that DDP's backward also runs on ranks without data.
        inputs, targets_N = inputs.new_zeros((1, *inputs.shape[1:])), targets_N.new_zeros(1)

    optimizer.zero_grad(set_to_none=True)

    logits_NK = model(inputs)
    loss = F.cross_entropy(
        logits_NK, targets_N, class_weights_K, reduction="sum", label_smoothing=config.label_smoothing
    )
    # DDP averages gradients over workers. The factor makes this average the weighted mean over the rows of the global
    # batch, even if workers have different numbers of rows. The last factor is 0 for a dummy batch.
    loss = loss * (ranks.world_size / global_weight) * (num_rows > 0)
    loss.backward()

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
    optimizer.step()
    return _compute_sums(logits_NK.detach()[:num_rows], targets_N[:num_rows])


def _compute_sums(logits_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(logits_NK, targets_N, reduction="sum").double()
    num_correct = (logits_NK.argmax(dim=1) == targets_N).sum().double()
    return torch.stack([loss, num_correct, torch.full_like(loss, len(targets_N))])


def check_totals(totals: EpochTotals, epoch: int, config: TrainConfig) -> CatsdogsError | None:
    """Return the error that ends training, or None."""
    if totals.num_rows == 0:
        return InputError("no training image can be decoded; check the paths and the files")
    if not math.isfinite(totals.loss):
        return RunError(
            f"the loss is not finite in epoch {epoch}: start a new run with a lower --lr than {config.peak_lr:g}"
        )
    return None


def validate(worker: TrainWorker, inputs: Inputs, epoch: int) -> tuple[MetricSums, pa.Table | None]:
    """Predict the validation rows; the workers share them.

    Returns:
        The sums over all rows; the rows of `PREDICTIONS`, sorted by path, or None if this is not the first worker.
    """
    worker.ranks.broadcast_buffers(worker.model)  # BatchNorm statistics differ between workers
    num_rows, class_names = worker.spec.validation_files.num_rows, worker.spec.folder.class_names
    tables = [PREDICTIONS.empty_table()]
    for i, table in enumerate(inputs.predict_validation(worker.model), start=1):
        tables.append(table)
        num_done = i * VALIDATION_BATCH_SIZE * worker.ranks.world_size
        worker.events.send_progress("validate", num_done, num_rows, f"epoch {epoch}/{worker.spec.config.epochs}")
    predictions = pa.concat_tables(tables)
    vector = torch.tensor(MetricSums.from_predictions(predictions, class_names).vector(), device=worker.device)
    sums = MetricSums.from_vector(worker.ranks.all_reduce(vector).cpu().numpy(), len(class_names))
    gathered = worker.ranks.gather(predictions)
    return sums, pa.concat_tables(gathered).sort_by("path") if gathered is not None else None


def save_checkpoint(
    worker: TrainWorker, writer: CheckpointWriter, saver: StepSaver, row: EpochRow, predictions: pa.Table | None
) -> None:
    """Add a finished epoch to the history; the first worker saves it if it is due.

    Args:
        predictions: as `validate` returns them.
    """
    worker.history.rows.append(row)
    if predictions is not None:  # on the first worker
        is_last = is_finished(worker.history, worker.spec.config)
        writer.save(worker.history, worker.model, worker.optimizer, predictions, is_last)
        saver.remove_saved()
        worker.events.send(EpochFinished(worker.history, writer.num_saved))
