"""Progress events of a command. The caller passes a `Progress` callback that shows them."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa  # the command line starts without it

T = TypeVar("T")
MAX_REPORTED_ROWS = 10
STALL_S = 30.0  # without progress, until it is reported
STALL_POLL_S = 1.0


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


class StallReporter:
    """Reports what is waited for when there is no progress for STALL_S, and again whenever the wait has doubled.

    It is a `Progress` callback itself: every event counts as progress and is passed on. Works inside a `with` block.
    """

    def __init__(self, progress: Progress, describe_wait: Callable[[], str]) -> None:
        self._progress = progress
        self._describe_wait = describe_wait
        self._waiting_since_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report_stalls, name="stalls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def __call__(self, event: StageProgress | Message) -> None:
        """Pass on an event."""
        self._waiting_since_s = time.monotonic()
        self._progress(event)

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield from `batches`. Only the time until the next one counts as waiting."""
        for batch in batches:
            self._waiting_since_s = math.inf
            yield batch
            self._waiting_since_s = time.monotonic()

    def _report_stalls(self) -> None:
        next_s = STALL_S
        while not self._ended.wait(STALL_POLL_S):
            waited_s = time.monotonic() - self._waiting_since_s
            if waited_s < STALL_S:
                next_s = STALL_S
            elif waited_s >= next_s:
                next_s *= 2
                self._progress(Message(f"no progress for {waited_s:.0f} s: {self._describe_wait()}"))


def report_failed_rows(rows: "pa.Table", what: str, progress: Progress) -> None:
    """Report how many rows have failed, and why the first of them did.

    Args:
        rows: `path`, `status`, `error`; rows whose status is `ok` are not counted.
        what: follows the count, such as "images were not classified and count as incorrect".
    """
    failed = [row for row in rows.select(["path", "status", "error"]).to_pylist() if row["status"] != "ok"]
    if failed:
        progress(Message(f"{len(failed)} {what}"))
    for row in failed[:MAX_REPORTED_ROWS]:
        progress(Message(f"  {row['path']}: {row['status']}, {row['error']}"))
