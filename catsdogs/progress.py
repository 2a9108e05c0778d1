"""Progress events of a command. The caller passes a `Progress` callback that shows them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa  # the command line starts without it

MAX_REPORTED_ROWS = 10


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Number of items that a stage has finished; `total` is None while it is unknown."""

    stage: str
    done: int
    total: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One line for the user."""

    text: str


Progress = Callable[[StageProgress | Message], None]


def silent(_: StageProgress | Message) -> None:
    """Ignore every event."""


def report_failed_rows(rows: "pa.Table", what: str, progress: Progress) -> None:
    """Report how many rows have failed, and why the first of them did.

    Args:
        rows: `path`, `status`, `error`; rows whose status is `ok` are not counted.
        what: follows the count, such as "images have no label and count as incorrect".
    """
    failed = [row for row in rows.select(["path", "status", "error"]).to_pylist() if row["status"] != "ok"]
    if failed:
        progress(Message(f"{len(failed)} {what}"))
    for row in failed[:MAX_REPORTED_ROWS]:
        progress(Message(f"  {row['path']}: {row['status']}, {row['error']}"))
