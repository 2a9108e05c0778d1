"""Check every file of a run before `--resume` writes to its folder.

After a crash, the other files may be ahead of `last/training_state.pt`; see run_folder.py.
"""

import csv
import io
from typing import NamedTuple

import pyarrow as pa

from catsdogs import storage
from catsdogs.checkpoint import read_checkpoint
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
    load_state,
)


class SavedRun(NamedTuple):
    """The finished epochs of a run and its classes in index order; without an epoch, the classes are not known."""

    history: History
    class_names: tuple[str, ...] = ()


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
    history = History(load_state(state_uri)["history"])
    if not history.epoch:
        return SavedRun(history)
    best, last = (read_checkpoint(storage.join(uri, name)).class_names for name in (BEST, LAST))
    if best != last:
        raise InputError(f"{BEST} has the classes {format_names(best)}, {LAST} has {format_names(last)}")
    _check_summary(storage.join(uri, SUMMARY), history, max_ahead=1 if saves_every_epoch else None)
    _check_predictions(storage.join(uri, VAL_PREDICTIONS))
    return SavedRun(history, last)


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
