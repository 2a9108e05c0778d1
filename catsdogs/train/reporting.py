"""Events and results of a run -> lines and the report."""

import dataclasses
import datetime
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import report, storage
from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError
from catsdogs.images import decode
from catsdogs.labels import LabelledFiles
from catsdogs.metrics import MetricSums
from catsdogs.progress import Message, Progress, StageProgress
from catsdogs.train.run_folder import ARGS, LEFT_OUT, REPORT, VAL_PREDICTIONS, History, RunFolder
from catsdogs.train.settings import format_args_yaml
from catsdogs.train.worker import MAX_NAMED_IMAGES, EpochFinished, FatalError, LeftOut, Started

NUM_PICTURES = 24  # of a section of the report


class ProgressReporter:
    """Turns what workers send into lines, and keeps the history."""

    def __init__(self, config: TrainConfig, folder: RunFolder, progress: Progress) -> None:
        self.progress = progress
        self.history = History()
        self.num_saved = 0
        self.config = config
        self._folder = folder
        self.fatal_error: CatsdogsError | None = None
        self._num_starts = 0

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name or ""

    def on_event(self, event: object) -> None:
        """Show one event."""
        if isinstance(event, Started):
            self._started(event)
        elif isinstance(event, EpochFinished):
            self.history, self.num_saved = History(event.history), event.num_saved
            self.progress(Message(self._epoch_line()))
        elif isinstance(event, LeftOut):
            self._left_out(event)
        elif isinstance(event, FatalError):
            self.fatal_error = event.error
        elif isinstance(event, StageProgress | Message):
            self.progress(event)

    def _started(self, event: Started) -> None:
        self.history, self.num_saved = History(event.history), len(event.history)
        self._num_starts += 1
        if self._num_starts > 1:
            self.progress(Message(f"a worker died: the group restarted after epoch {self.history.epoch}"))
            return
        self.config = dataclasses.replace(self.config, precision=event.precision)
        storage.write_bytes(self._folder.path(ARGS), format_args_yaml(self.config))
        where = f"training on {self.config.num_workers} x {event.device} in {event.precision}"
        going_on = f", going on after epoch {self.history.epoch}" if self.config.resume else ""
        self.progress(Message(where + going_on))

    def _epoch_line(self) -> str:
        row, rows = self.history.rows[-1], self.history.rows
        left_s = (self.config.epochs - len(rows)) * sum(r["seconds"] for r in rows) / len(rows)
        best = " (best)" if self.history.best_epoch == len(rows) else ""
        return (
            f"epoch {len(rows)}/{self.config.epochs}  "
            f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.4f}  "
            f"val_loss {row['val_loss']:.4f}  val_accuracy {row['val_accuracy']:.4f}{best}  "
            f"{row['images_per_s']:.1f} img/s  ETA {datetime.timedelta(seconds=round(left_s))}"
        )

    def _left_out(self, event: LeftOut) -> None:
        self.progress(Message(f"left out {len(event.rows)} training images; all in {self._folder.path(LEFT_OUT)}"))
        for path, status, error in event.rows[:MAX_NAMED_IMAGES]:
            self.progress(Message(f"  {path}: {status}, {error}"))


def report_sections(
    config: TrainConfig, folder: RunFolder, history: History, train_files: LabelledFiles
) -> list[report.Section]:
    """Build the sections of a run's page."""
    predictions = pq.read_table(pa.BufferReader(storage.read_bytes(folder.path(VAL_PREDICTIONS))))
    best = history.rows[history.best_epoch - 1]
    sums = MetricSums.from_predictions(predictions, folder.class_names)
    return [
        report.facts(
            {
                "validation accuracy": f"{best['val_accuracy']:.4f}",
                "best epoch": f"{history.best_epoch} of {history.epoch}",
                "training images": f"{train_files.files.num_rows:,}",
                "validation images": f"{predictions.num_rows:,}",
                "img/s": f"{best['images_per_s']:.1f}",
            }
        ),
        report.curves(history.rows, best_epoch=history.best_epoch),
        report.confusion_matrix(folder.class_names, sums.matrix_KK, sums.failed_K.tolist()),
        report.worst_mistakes(list(_mistakes(predictions))),
        report.dataset_grid(list(_samples(train_files))),
        report.settings(dataclasses.asdict(config)),
    ]


def write_report(config: TrainConfig, folder: RunFolder, history: History, train_files: LabelledFiles) -> None:
    """Write `report.html` of a finished run."""
    page = report.page(
        f"Training {config.name}", report_sections(config, folder, history, train_files), subtitle=folder.uri
    )
    storage.write_bytes(folder.path(REPORT), page.encode())


def _mistakes(predictions: pa.Table) -> Iterator[report.Picture]:
    wrong = [row for row in predictions.to_pylist() if row["label"] not in (None, row["true_label"])]
    for row in sorted(wrong, key=lambda row: -row["prob"])[:NUM_PICTURES]:
        yield from _picture(row["path"], row["true_label"], row["label"], row["prob"])


def _samples(labelled: LabelledFiles) -> Iterator[report.Picture]:
    """Take pictures of every class, spread over its files, up to the number that the page shows."""
    index = labelled.files["true_index"].to_numpy()
    each = max(1, NUM_PICTURES // len(labelled.class_names))
    for i, name in enumerate(labelled.class_names[:NUM_PICTURES]):
        rows = np.flatnonzero(index == i)
        for row in rows[np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)]:
            yield from _picture(labelled.files["path"][int(row)].as_py(), name)


def _picture(
    path: str, true_label: str, label: str | None = None, prob: float | None = None
) -> Iterator[report.Picture]:
    fetched = storage.fetch([storage.Entry(path)])[0]
    image = decode(fetched.image_bytes).image if fetched.image_bytes else None
    if image is not None:
        yield report.Picture(path=path, image=image, true_label=true_label, label=label, prob=prob)
