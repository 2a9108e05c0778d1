"""The files of a run: checkpoints, tables, and the training state that a run resumes from.

An epoch is saved once `last/training_state.pt` has it. This file is written last and atomically, and has all that
resuming needs. After a crash, other files may be ahead of it; the run then repeats these epochs, with the same rows in
the same order, and overwrites the files. The file exists from the start of a run, without an epoch, so that a run whose
state was lost is not taken for one that has just started.
"""

import copy
import csv
import io
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from catsdogs import storage
from catsdogs.checkpoint import HEAD, check_shapes, list_shapes, write_checkpoint
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.metrics import find_best_epoch
from catsdogs.resnet import ResNet50
from catsdogs.schema import parquet_bytes
from catsdogs.text import format_reason

SUMMARY_COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "images_per_s", "seconds")
BEST, LAST, STATE = "best", "last", "training_state.pt"
ARGS, SUMMARY, REPORT = "args.yaml", "summary.csv", "report.html"
VAL_PREDICTIONS, LEFT_OUT = "val_predictions.parquet", "left_out.parquet"

EpochRow = dict[str, float]  # SUMMARY_COLUMNS of one epoch


@dataclass
class History:
    """The finished epochs of a run."""

    rows: list[EpochRow] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """The last finished epoch; 0 before the first."""
        return len(self.rows)

    @property
    def best_epoch(self) -> int:
        """The epoch whose model is in `best/`; 0 before the first."""
        return find_best_epoch(self.rows) or 0


@dataclass(frozen=True)
class RunFolder:
    """A run's files under `uri`."""

    uri: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def path(self, *names: str) -> str:
        return storage.join(self.uri, *names)

    def write_state(self, state: dict[str, Any]) -> None:
        """Write the training state: `history`, and unless it is empty `model` and `optimizer`."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.write_bytes(self.path(LAST, STATE), buffer.getvalue())

    def load_state(self) -> dict[str, Any]:
        """Load the training state; raises as `load_state`."""
        return load_state(self.path(LAST, STATE))


class CheckpointWriter:
    """Saves epochs at most once per `interval_s`, and always the last one of the run."""

    def __init__(self, folder: RunFolder, num_saved: int, num_epochs: int, interval_s: float) -> None:
        self._folder = folder
        self._num_epochs = num_epochs
        self._interval_s = interval_s
        self._saved_at = time.monotonic()
        self._unsaved_best: tuple[ResNet50, pa.Table] | None = None  # and its validation predictions
        self.num_saved = num_saved

    def save(self, history: History, model: ResNet50, optimizer: torch.optim.Optimizer, predictions: pa.Table) -> None:
        """Save the last epoch of `history` if it is due; else keep its model in memory if it is the best one."""
        if history.best_epoch == history.epoch:
            self._unsaved_best = copy.deepcopy(model), predictions
        is_due = time.monotonic() - self._saved_at >= self._interval_s
        if is_due or history.epoch == self._num_epochs:
            self._write(history, model, optimizer)
            self._unsaved_best, self._saved_at, self.num_saved = None, time.monotonic(), history.epoch

    def _write(self, history: History, model: ResNet50, optimizer: torch.optim.Optimizer) -> None:
        folder = self._folder
        if self._unsaved_best is not None:
            best_model, predictions = self._unsaved_best
            write_checkpoint(folder.path(BEST), best_model.state_dict(), folder.class_names, folder.preprocessing)
            storage.write_bytes(folder.path(VAL_PREDICTIONS), parquet_bytes(predictions))
        write_checkpoint(folder.path(LAST), model.state_dict(), folder.class_names, folder.preprocessing)
        storage.write_bytes(folder.path(SUMMARY), _format_summary(history))
        state = {"history": history.rows, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        folder.write_state(state)


def load_state(uri: str) -> dict[str, Any]:
    """Load the training state that `RunFolder.write_state` wrote; raises InputError if it is missing or damaged."""
    content = storage.read_bytes(uri)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _check_state(state)
    except Exception as error:  # damaged bytes raise errors of any type
        raise InputError(f"{uri} is damaged: {type(error).__name__}: {format_reason(error)}") from error
    return state


def _check_state(state: Any) -> None:
    """Raise an error of any type if a loaded object is not a training state."""
    _format_summary(History(state["history"]))
    if state["history"]:
        shapes = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
        check_shapes(list_shapes(len(state["model"][f"{HEAD}.bias"])), shapes, "model")
        assert "param_groups" in state["optimizer"]


def _format_summary(history: History) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(format_row, history.rows))
    return text.getvalue().encode()


def format_row(row: EpochRow) -> dict[str, str]:
    """Format an epoch as a row of `summary.csv`."""
    return {name: str(int(row[name])) if name == "epoch" else f"{row[name]:.6g}" for name in SUMMARY_COLUMNS}
