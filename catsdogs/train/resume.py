"""Check every file of a run before `--resume` writes to its folder.

After a crash, the other files may be older than `last/training_state.pt`; see run_folder.py. An earlier version wrote
the training state last and without the SHA-256 of the other files, which may then be newer.
"""

import csv
import io
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa

from catsdogs import storage
from catsdogs.checkpoint import WEIGHTS, read_checkpoint, read_config
from catsdogs.errors import InputError
from catsdogs.schema import PREDICTIONS, read_table
from catsdogs.text import format_names, format_reason
from catsdogs.train.run_folder import (
    BEST,
    LAST,
    STATE,
    SUMMARY,
    SUMMARY_COLUMNS,
    VAL_PREDICTIONS,
    History,
    format_row,
    hash_files,
    load_state,
)
from catsdogs.train.step_state import load_step_state


class SavedRun(NamedTuple):
    """What is saved of a run.

    Attributes:
        class_names: in index order; empty if no model is saved, since the classes are then not known.
        step_files_sha256: the training files of a saved state within the next epoch, as `hash_training_files` returns
            it; None if there is no such state.
    """

    history: History
    class_names: tuple[str, ...] = ()
    step_files_sha256: str | None = None

    @property
    def has_model(self) -> bool:
        """Whether a model is saved, so that the run needs no initial weights."""
        return self.history.epoch > 0 or self.step_files_sha256 is not None


def load_saved_run(uri: str, saves_every_epoch: bool) -> SavedRun:
    """Load what is needed to resume the run at `uri`, once all its files are checked.

    Args:
        saves_every_epoch: else other files may be several epochs ahead of the training state.

    Raises:
        InputError: a file is missing or damaged, or does not belong to the training state.
    """
    try:
        return _load(uri, saves_every_epoch)
    except InputError as error:
        raise InputError(
            f"cannot resume {uri}: {error}; restore this file, or start a new run with another --name"
        ) from error


def _load(uri: str, saves_every_epoch: bool) -> SavedRun:
    state_uri = storage.join(uri, LAST, STATE)
    if not storage.exists(state_uri):
        found = [name for name in storage.list_names(uri) if name in (BEST, LAST, SUMMARY, VAL_PREDICTIONS)]
        if found:
            raise InputError(f"{LAST}/{STATE} is missing, but there is {', '.join(found)}")
        return SavedRun(History())  # it ended before its first files were written
    state = load_state(state_uri)
    history = History(state["history"])
    if "sha256" in state:  # also without an epoch: the state may be older than the files of finished epochs
        class_names = tuple(state["class_names"])
        _check_digests(uri, state["sha256"], class_names)
        step_state = load_step_state(uri, state)
        if step_state is not None:
            return SavedRun(history, tuple(step_state.class_names), step_state.files_sha256)
        return SavedRun(history, class_names if history.epoch else ())
    if not history.epoch:
        return SavedRun(history)
    return SavedRun(history, _check_contents(uri, history, saves_every_epoch))


def _check_digests(uri: str, digests: Mapping[str, list[str | None]], class_names: tuple[str, ...]) -> None:
    """Check that each file is that of the training state or the one that it replaces."""
    found_files = hash_files(uri)
    for name, sha256 in found_files.items():
        if sha256 not in digests[name]:
            raise InputError(
                f"{name} is damaged or of another run: expected {_format_digest(digests[name][0])}, as "
                f"{LAST}/{STATE} says, found {_format_digest(sha256)}"
            )
    for name in (BEST, LAST):
        if found_files[f"{name}/{WEIGHTS}"] is not None:
            _check_class_names(storage.join(uri, name), class_names)


def _format_digest(sha256: str | None) -> str:
    return "no file" if sha256 is None else f"SHA-256 {sha256[:16]}"


def _check_class_names(uri: str, expected: tuple[str, ...]) -> None:
    found = read_config(uri).class_names
    if found != expected:
        raise InputError(f"{uri} has the classes {format_names(found)}, {LAST}/{STATE} has {format_names(expected)}")


def _check_contents(uri: str, history: History, saves_every_epoch: bool) -> tuple[str, ...]:
    """Check the files of a run whose training state has no digests; return the class names."""
    best, last = (read_checkpoint(storage.join(uri, name)).class_names for name in (BEST, LAST))
    if best != last:
        raise InputError(f"{BEST} has the classes {format_names(best)}, {LAST} has {format_names(last)}")
    _check_summary(storage.join(uri, SUMMARY), history, max_ahead=1 if saves_every_epoch else None)
    _check_predictions(storage.join(uri, VAL_PREDICTIONS))
    return last


def _check_summary(uri: str, history: History, max_ahead: int | None) -> None:
    """Check that a summary starts with the epochs of the training state."""
    try:
        rows = list(csv.DictReader(io.StringIO(storage.read_bytes(uri).decode())))
    except (ValueError, csv.Error) as error:
        raise InputError(f"{uri} is damaged: {format_reason(error)}") from error
    saved = [{name: row.get(name) for name in SUMMARY_COLUMNS} for row in rows[: history.epoch]]
    too_many = max_ahead is not None and len(rows) > history.epoch + max_ahead
    if too_many or saved != [format_row(row) for row in history.rows]:
        raise InputError(
            f"{SUMMARY} and {LAST}/{STATE} are of different epochs or runs: expected the {history.epoch} epochs of the "
            f"state in {SUMMARY}, found {len(rows)} rows"
        )


def _check_predictions(uri: str) -> None:
    try:
        read_table(storage.read_bytes(uri), PREDICTIONS.names)
    except pa.ArrowException as error:
        raise InputError(f"{uri} is damaged: {format_reason(error)}") from error
