"""What a run writes: checkpoints, the state to go on from, its tables.

An epoch is finished when `last/training_state.pt` names it: that one file holds all that resuming needs and is written
last, whole. What stands beside it may be ahead after a crash; the epochs since are then repeated, with the same rows in
the same order, and overwrite it.
"""

import csv
import io
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from catsdogs import checkpoint, storage
from catsdogs.errors import RunError
from catsdogs.images import Preprocessing
from catsdogs.schema import parquet_bytes
from catsdogs.vision import ResNet

SUMMARY_COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "images_per_s",
    "seconds",
)
BEST, LAST, STATE = "best", "last", "training_state.pt"
ARGS, SUMMARY, REPORT = "args.yaml", "summary.csv", "report.html"
VAL_PREDICTIONS, LEFT_OUT = "val_predictions.parquet", "left_out.parquet"

EpochRow = dict[str, float]


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
        """The epoch of highest validation accuracy, of lower loss among equals; 0 before the first."""
        return int(max(self.rows, key=_rank)["epoch"]) if self.rows else 0


def _rank(row: EpochRow) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"] if math.isfinite(row["val_loss"]) else -math.inf


class Best(NamedTuple):
    """The model of the best epoch, and what it says of the validation rows."""

    model: ResNet
    predictions: pa.Table


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    uri: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def path(self, *names: str) -> str:
        """Name a file of the run."""
        return storage.join(self.uri, *names)

    def save_epoch(self, history: History, model: ResNet, optimizer: torch.optim.Optimizer, best: Best | None) -> None:
        """Write a finished epoch: the best one where it is new, last, then the state that makes it count."""
        if best is not None:
            checkpoint.save(self.path(BEST), best.model, self.class_names, self.preprocessing)
            storage.write_bytes(self.path(VAL_PREDICTIONS), parquet_bytes(best.predictions))
        checkpoint.save(self.path(LAST), model, self.class_names, self.preprocessing)
        storage.write_bytes(self.path(SUMMARY), summary_csv(history))
        state = {"history": history.rows, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.write_bytes(self.path(LAST, STATE), buffer.getvalue())

    def has_state(self) -> bool:
        """Whether an epoch is finished."""
        return storage.exists(self.path(LAST, STATE))

    def load_state(self) -> dict[str, Any]:
        """Read the last finished epoch: `history`, `model`, `optimizer`.

        Raises:
            RunError: the file is damaged.
        """
        content = storage.read_bytes(self.path(LAST, STATE))
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch names no common class for a damaged file
            raise RunError(
                f"{self.path(LAST, STATE)} is damaged: {error}; start a new run from {self.path(BEST)}"
            ) from error
        return state


def summary_csv(history: History) -> bytes:
    """Lay the finished epochs out as `summary.csv`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in history.rows:
        writer.writerow({name: f"{row[name]:.6g}" if name != "epoch" else int(row[name]) for name in SUMMARY_COLUMNS})
    return text.getvalue().encode()
