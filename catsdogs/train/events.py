"""Events that training workers send to the driver while it waits in `Trainer.fit`, and their display.

`Message` and `StageProgress` of catsdogs.progress are events, too.
"""

import contextlib
import datetime
import logging
import math
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.train import UserCallback
from ray.util.queue import Empty, Queue

from catsdogs import ray_metrics
from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError, InputError, NotRetryableError
from catsdogs.progress import Message, Progress, StageProgress
from catsdogs.ray_errors import RetryableError, unwrap_ray_error
from catsdogs.text import format_names
from catsdogs.train.run_folder import History
from catsdogs.train.tracking import Tracker

if TYPE_CHECKING:  # imports torch, which the driver does not need
    from catsdogs.process_setup import Precision

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0
POLL_INTERVAL_S = 0.5
NOT_RETRYABLE = "a restart of the workers would fail in the same way"


@dataclass(frozen=True)
class Started:
    """A worker group starts; `history` has the finished epochs, `num_steps` are those of the next that were taken."""

    history: History
    precision: "Precision"
    device: str
    num_steps: int = 0


@dataclass(frozen=True)
class StepSaved:
    """The state after some steps of an epoch is on storage."""

    epoch: int
    num_steps: int


@dataclass(frozen=True)
class PreemptionNotice:
    """Nodes of the workers will be preempted; `deadline_ms` is a UNIX time, None if it is not known."""

    node_ids: tuple[str, ...]
    deadline_ms: int | None


@dataclass(frozen=True)
class EpochFinished:
    """An epoch is finished; `history` ends with it. The first `num_saved` epochs are on storage."""

    history: History
    num_saved: int


@dataclass(frozen=True)
class TrainingFailed:
    """A worker stops because of `error`: a CatsdogsError, or a RuntimeError with the traceback of a bug."""

    error: Exception


class EventSender:
    """Sends a worker's events to the driver; `put` is the method of a queue."""

    def __init__(self, put: Callable[[bytes], object], rank: int) -> None:
        self._put = put
        self._rank = rank
        self._progress_sent_at = -math.inf

    def send(self, event: object, from_any_rank: bool = False) -> None:
        """Send an event if this is the first worker. `from_any_rank` is for events of a single worker."""
        if self._rank == 0 or from_any_rank:
            self._put(pickle.dumps(event))  # bytes: the queue's process would import torch to unpickle the event

    def send_text(self, text: str) -> None:
        """Send a line if this is the first worker."""
        self.send(Message(text))

    def send_progress(self, stage: str, done: int, total: int, note: str) -> None:
        """Send the progress of a stage, at most once per PROGRESS_INTERVAL_S."""
        now = time.monotonic()
        if now - self._progress_sent_at >= PROGRESS_INTERVAL_S:
            self._progress_sent_at = now
            self.send(StageProgress(stage, min(done, total), total, note))


@contextlib.contextmanager
def report_failures(events: EventSender, rank: int) -> Iterator[None]:
    """Report an exception of the body to the driver, then raise it for Ray Train.

    If a restart would not help, it raises a RuntimeError with the text NOT_RETRYABLE.
    """
    try:
        yield
    except Exception as error:
        logger.debug("training worker %d failed", rank, exc_info=True)
        events.send(Message(f"worker {rank}: {type(error).__name__}: {error}"), from_any_rank=True)
        explained = explain_failure(error)
        if explained is not None:
            events.send(TrainingFailed(explained), from_any_rank=True)
        if isinstance(explained, InputError | NotRetryableError | RuntimeError):
            raise RuntimeError(NOT_RETRYABLE) from error
        raise


def explain_failure(error: Exception) -> Exception | None:
    """Return a CatsdogsError, or a RuntimeError with the traceback of a bug; None for a failure of Ray or a machine.

    A RuntimeError does not count as a bug: torch raises it if another worker of a collective dies, or if a GPU runs out
    of memory.
    """
    cause = unwrap_ray_error(error)
    if isinstance(cause, RetryableError | RuntimeError):
        return None
    if isinstance(cause, CatsdogsError):
        return cause
    return RuntimeError("".join(["a training worker failed:\n", *traceback.format_exception(error)]))


def make_retry_policy() -> UserCallback:
    """Make a callback that ends a run after a failure that is not retryable.

    Ray Train restarts the workers after any exception, `max_failures` times; an exception in a callback ends the run.
    """
    not_retryable = NOT_RETRYABLE

    class EndNotRetryable(UserCallback):  # local, so that the controller does not import this package
        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if not_retryable in str(error):
                    raise RuntimeError(not_retryable) from error

    return EndNotRetryable()


@contextlib.contextmanager
def forward_events(events: Queue, on_event: Callable[[object], None]) -> Iterator[None]:
    """Call `on_event` in a thread with every event while the body runs; after it, raise what `on_event` raised."""
    done = threading.Event()

    def forward() -> None:
        while not (done.is_set() and events.empty()):
            with contextlib.suppress(Empty):
                on_event(pickle.loads(events.get(timeout=POLL_INTERVAL_S)))

    with ThreadPoolExecutor(1) as executor:
        forwarding = executor.submit(forward)
        try:
            yield
        finally:
            done.set()
            if error := forwarding.exception():
                logger.debug("an event could not be shown", exc_info=error)
            events.shutdown(force=True)
    forwarding.result()


class ProgressReporter:
    """Shows events to the user, and keeps the state of the run.

    Attributes:
        num_saved: finished epochs on storage.
        num_saved_steps: steps of the epoch after them on storage.
        precision: chosen by the workers; None until they start.
        error: why the workers stopped, if one of them reported it; None again after a restart.
    """

    def __init__(self, config: TrainConfig, progress: Progress, tracker: Tracker) -> None:
        self._config = config
        self._progress = progress
        self._tracker = tracker
        self.history = History()
        self.num_saved = self.num_saved_steps = 0
        self.precision: Precision | None = None
        self.error: Exception | None = None
        self._has_notice = False

    def on_event(self, event: object) -> None:
        """Show an event and update the state."""
        if isinstance(event, Started):
            self._on_start(event)
        elif isinstance(event, EpochFinished):
            self.history, self.num_saved, self.num_saved_steps = event.history, event.num_saved, 0
            self._progress(Message(self._format_epoch()))
            self._tracker.log_epoch(self.history.rows[-1])
            ray_metrics.set_epoch(str(self._config.name), self.history.rows[-1])
        elif isinstance(event, StepSaved):
            self.num_saved_steps = event.num_steps
        elif isinstance(event, PreemptionNotice):
            self._has_notice = True
            self._progress(Message(_format_notice(event)))
        elif isinstance(event, TrainingFailed):
            self.error = event.error
        elif isinstance(event, StageProgress | Message):
            self._progress(event)

    def _on_start(self, event: Started) -> None:
        is_restart = self.precision is not None
        self.precision, self.error = event.precision, None
        self.history, self.num_saved, self.num_saved_steps = event.history, event.history.epoch, event.num_steps
        if is_restart:
            reason = "a node was preempted" if self._has_notice else "a worker died"
            self._has_notice = False
            self._progress(Message(f"{reason}: the group restarted after {self._format_position()}"))
            return
        line = f"training on {self._config.num_workers} x {event.device} in {event.precision}"
        self._progress(Message(f"{line}, resuming after {self._format_position()}" if self._config.resume else line))

    def _format_position(self) -> str:
        """Format what the workers continue after."""
        if self.num_saved_steps:
            return f"step {self.num_saved_steps} of epoch {self.num_saved + 1}"
        return f"epoch {self.num_saved}"

    def _format_epoch(self) -> str:
        rows, num_epochs = self.history.rows, self._config.epochs
        row = rows[-1]
        left_s = (num_epochs - len(rows)) * sum(row["seconds"] for row in rows) / len(rows)
        best = " (best)" if self.history.best_epoch == len(rows) else ""
        return (
            f"epoch {len(rows)}/{num_epochs}  "
            f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.4f}  "
            f"val_loss {row['val_loss']:.4f}  val_accuracy {row['val_accuracy']:.4f}{best}  "
            f"{row['images_per_s']:.1f} img/s  ETA {datetime.timedelta(seconds=round(left_s))}"
        )

    def describe_saved(self) -> str:
        """Describe what is kept of a failed run, and how to resume it."""
        kept = f"{self.num_saved} finished epochs are saved" if self.num_saved else "no epoch is finished"
        if self.num_saved_steps:
            kept += f", and {self.num_saved_steps} steps of epoch {self.num_saved + 1} are saved"
        return f"{kept}; to resume, repeat the command with --name {self._config.name} --resume"


def _format_notice(notice: PreemptionNotice) -> str:
    nodes = format_names(notice.node_ids)
    if notice.deadline_ms is None:
        return f"Ray announces the preemption of node {nodes}: the state is saved until then"
    deadline = datetime.datetime.fromtimestamp(notice.deadline_ms / 1000, datetime.UTC)
    return f"Ray announces the preemption of node {nodes} at {deadline:%H:%M:%S} UTC: the state is saved until then"
