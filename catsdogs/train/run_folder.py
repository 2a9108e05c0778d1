"""The files of a run: checkpoints, tables, and the training state that a run resumes from.

An epoch is saved once `last/training_state.pt` has it. This file is written first and atomically. It has all that
resuming needs, and the content of the other files of the same save. If a process is killed between two of them, older
ones are left, each complete, and the next worker writes them from the state. The state names the SHA-256 of every file,
and that of the file before it, so `--resume` refuses a file of another run.

The first worker writes the training state at the start of a run, without an epoch, so that a run whose state was lost
is not taken for one that has just started.
"""

import copy
import csv
import hashlib
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from catsdogs import storage
from catsdogs.calibration import fit_calibration
from catsdogs.checkpoint import (
    CONFIG,
    HEAD,
    WEIGHTS,
    check_shapes,
    list_shapes,
    serialize_checkpoint,
    serialize_config,
)
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.lease import LeaseClaim
from catsdogs.metrics import find_best_epoch
from catsdogs.schema import parquet_bytes, read_table
from catsdogs.text import format_reason

if TYPE_CHECKING:  # imports torch, which the driver does not need
    import torch

    from catsdogs.resnet import ResNet50

SUMMARY_COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "images_per_s", "seconds")
BEST, LAST, STATE = "best", "last", "training_state.pt"
STEP_STATE = "step_state.pt"  # in last/, of an unfinished epoch; see step_state.py
FEATURES, FEATURES_LOCATION = "features", "features.json"
ARGS, SUMMARY, REPORT = "args.yaml", "summary.csv", "report.html"
VAL_PREDICTIONS, LEFT_OUT = "val_predictions.parquet", "left_out.parquet"
HASHED_FILES = (SUMMARY, f"{LAST}/{WEIGHTS}", f"{BEST}/{WEIGHTS}", VAL_PREDICTIONS)  # in the training state

EpochRow = dict[str, float]  # SUMMARY_COLUMNS of one epoch
Digests = dict[str, str | None]  # SHA-256 of HASHED_FILES; None if there is no file


@dataclass
class History:
    """The finished epochs of a run."""

    rows: list[EpochRow] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """The last finished epoch; 0 before the first."""
        return len(self.rows)

    @property
    def num_without_improvement(self) -> int:
        """Epochs since that of the lowest validation loss; NaN is never lower."""
        losses = [row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf for row in self.rows]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def best_epoch(self) -> int:
        """The epoch whose model is in `best/`; 0 before the first."""
        return find_best_epoch(self.rows) or 0


@dataclass(frozen=True)
class RunFolder:
    """A run's files under `uri`, which are written only while the driver has the lease."""

    uri: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    lease: LeaseClaim

    def path(self, *names: str) -> str:
        return storage.join(self.uri, *names)

    def write(self, content: bytes, *names: str) -> None:
        """Write a file; raises as `LeaseClaim.write`."""
        self.lease.write(self.path(*names), content)

    def remove_temporaries(self) -> None:
        """Remove the temporary files that killed processes left."""
        features = self.path(FEATURES)
        folders = [storage.join(features, name) for name in storage.list_names(features)]
        for uri in (self.uri, self.path(BEST), self.path(LAST), *folders):
            storage.remove_temporaries(uri)

    def write_first_state(self) -> None:
        """Write the training state of a run without an epoch, unless a file of a save is there."""
        names = [f"{LAST}/{STATE}", f"{LAST}/{STEP_STATE}", *HASHED_FILES]
        if not any(storage.exists(self.path(*name.split("/"))) for name in names):
            self.write_state(self._describe_files({name: [None] for name in HASHED_FILES}) | {"history": []})

    def _describe_files(self, digests: Mapping[str, list[str | None]]) -> dict[str, Any]:
        """Build the entries of the training state that say which files belong to it."""
        return {"class_names": list(self.class_names), "sha256": dict(digests)}

    def write_state(self, state: dict[str, Any]) -> None:
        """Write the training state: `history`, and unless it is empty what `save_state` adds."""
        self.write(serialize_state(state), LAST, STATE)

    def load_state(self) -> dict[str, Any]:
        """Load the training state; raises as `load_state`."""
        return load_state(self.path(LAST, STATE))

    def save_state(self, state: dict[str, Any], before: Digests) -> Digests:
        """Write the training state, then the other files of the same save.

        Args:
            state: `history`, `model` and `optimizer`; and unless `best/` stays as it is, `best_changes`, the tensors of
                its model that are not those of `model`, and `val_predictions`.
            before: the files that this save replaces.

        Returns:
            The files that are there now.
        """
        files = self._build_files(state)
        now = before | {name: hash_content(files[name]) for name in HASHED_FILES if name in files}
        if (best_sha256 := now[f"{BEST}/{WEIGHTS}"]) and VAL_PREDICTIONS in files:
            files[f"{BEST}/{CONFIG}"] = self._build_best_config(files[VAL_PREDICTIONS], best_sha256)
        digests = {name: list(dict.fromkeys([now[name], before[name]])) for name in HASHED_FILES}
        self.write_state(state | self._describe_files(digests))
        for name, content in files.items():
            self.write(content, *name.split("/"))
        return now

    def _build_files(self, state: dict[str, Any]) -> dict[str, bytes]:
        """Build the files of a save. The summary is first: then every checkpoint has its row."""
        files = {SUMMARY: _format_summary(History(state["history"]))}
        last = serialize_checkpoint(state["model"], self.class_names, self.preprocessing)
        files |= {f"{LAST}/{name}": content for name, content in last.items()}
        changes = state.get("best_changes")
        if changes is not None:
            best = last
            if changes:
                best = serialize_checkpoint(state["model"] | changes, self.class_names, self.preprocessing)
            files |= {f"{BEST}/{name}": content for name, content in best.items()}
        if state.get("val_predictions") is not None:
            files[VAL_PREDICTIONS] = state["val_predictions"]
        return files

    def _build_best_config(self, val_predictions: bytes, model_sha256: str) -> bytes:
        """Build `config.json` of the best epoch, calibrated on its validation rows.

        It names the weights: if the process is killed between the two files, the calibration of one is not used for
        the other.
        """
        calibration = fit_calibration(read_table(val_predictions), self.class_names, model_sha256)
        return serialize_config(self.class_names, self.preprocessing, calibration.to_json() if calibration else None)

    def restore_files(self, state: dict[str, Any]) -> Digests:
        """Write the files that are older than a training state, if a process was killed while it saved them.

        A state without digests is of an earlier version, which wrote it last: the other files may be newer.
        """
        found = hash_files(self.uri)
        history = History(state["history"])
        if not history.epoch or is_complete(state, found):
            return found
        if "sha256" not in state and history.best_epoch == history.epoch:
            state = state | {"best_changes": {}}
        return self.save_state(state, found)


def hash_content(content: bytes) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(content).hexdigest()


def hash_files(uri: str) -> Digests:
    """Hash the files of the run at `uri`."""
    return {name: _hash_file(storage.join(uri, *name.split("/"))) for name in HASHED_FILES}


def _hash_file(uri: str) -> str | None:
    found = storage.read_versioned(uri)
    return hash_content(found[0]) if found else None


def is_complete(state: Mapping[str, Any], found: Digests) -> bool:
    """Return whether all files are those of a training state."""
    return "sha256" in state and all(found[name] == digests[0] for name, digests in state["sha256"].items())


class CheckpointWriter:
    """Saves epochs at most once per `interval_s`, and always the last one.

    Attributes:
        files: of the last save.
        num_saved: finished epochs that are saved.
    """

    def __init__(self, folder: RunFolder, files: Digests, num_saved: int, interval_s: float) -> None:
        self._folder = folder
        self.files = files
        self._interval_s = interval_s
        self._saved_at = time.monotonic()
        self._unsaved_best: tuple[ResNet50, pa.Table] | None = None  # and its validation predictions
        self.num_saved = num_saved

    def save(
        self,
        history: History,
        model: "ResNet50",
        optimizer: "torch.optim.Optimizer",
        predictions: pa.Table,
        is_last: bool,
    ) -> None:
        """Save the last epoch of `history` if it is due; else keep its model in memory if it is the best one.

        Args:
            is_last: no epoch follows, so that this one is due.
        """
        if history.best_epoch == history.epoch:
            self._unsaved_best = copy.deepcopy(model), predictions
        is_due = time.monotonic() - self._saved_at >= self._interval_s
        if is_due or is_last:
            self._write(history, model, optimizer)
            self._unsaved_best, self._saved_at, self.num_saved = None, time.monotonic(), history.epoch

    def _write(self, history: History, model: "ResNet50", optimizer: "torch.optim.Optimizer") -> None:
        import torch

        tensors = model.state_dict()
        state: dict[str, Any] = {"history": history.rows, "model": tensors, "optimizer": optimizer.state_dict()}
        if self._unsaved_best is not None:
            best_model, predictions = self._unsaved_best
            best = best_model.state_dict()
            changes = {name: tensor for name, tensor in best.items() if not torch.equal(tensor, tensors[name])}
            state |= {"best_changes": changes, "val_predictions": parquet_bytes(predictions)}
        self.files = self._folder.save_state(state, self.files)


def serialize_state(state: dict[str, Any]) -> bytes:
    """Serialize a state with `torch.save`."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(uri: str) -> dict[str, Any]:
    """Load the training state that `RunFolder.write_state` wrote; raises InputError if it is missing or damaged."""
    import torch

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
    if "sha256" in state:
        assert state["sha256"].keys() == set(HASHED_FILES)
        "".join(state["class_names"])
        for digests in state["sha256"].values():
            assert digests
            assert isinstance(digests, list)
            assert all(digest is None or isinstance(digest, str) for digest in digests)


def _format_summary(history: History) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(format_row, history.rows))
    return text.getvalue().encode()


def format_row(row: EpochRow) -> dict[str, str]:
    """Format an epoch as a row of `summary.csv`."""
    return {name: str(int(row[name])) if name == "epoch" else f"{row[name]:.6g}" for name in SUMMARY_COLUMNS}
