"""The page `report.html` of a finished run."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from catsdogs import report, storage
from catsdogs.config import TrainConfig
from catsdogs.images import decode_image
from catsdogs.labels import LabelledFiles
from catsdogs.metrics import MetricSums
from catsdogs.schema import OK, read_table
from catsdogs.train.run_folder import REPORT, VAL_PREDICTIONS, History, RunFolder

NUM_PICTURES = 24  # in each section


def write_report(config: TrainConfig, folder: RunFolder, history: History, train_files: LabelledFiles) -> None:
    """Write `report.html` of a finished run."""
    predictions = read_table(storage.read_bytes(folder.path(VAL_PREDICTIONS)))
    best = history.rows[history.best_epoch - 1]
    sums = MetricSums.from_predictions(predictions, folder.class_names)
    facts = {
        "validation accuracy": f"{best['val_accuracy']:.4f}",
        "best epoch": f"{history.best_epoch} of {history.epoch}",
        "training images": f"{train_files.files.num_rows:,}",
        "validation images": f"{predictions.num_rows:,}",
        "img/s": f"{best['images_per_s']:.1f}",
    }
    sections = [
        report.facts(facts),
        report.curves(history.rows),
        report.confusion_matrix(folder.class_names, sums.matrix_KK, sums.failed_K.tolist()),
        report.worst_mistakes(list(_iter_mistakes(predictions))),
        report.dataset_grid(list(_iter_samples(train_files))),
        report.settings(dataclasses.asdict(config)),
    ]
    page = report.page(f"Training {config.name}", sections, subtitle=folder.uri)
    storage.write_bytes(folder.path(REPORT), page.encode())


def _iter_mistakes(predictions: pa.Table) -> Iterator[report.Picture]:
    """Yield the incorrect predictions, the most confident first."""
    incorrect = [row for row in predictions.to_pylist() if row["status"] == OK and row["label"] != row["true_label"]]
    for row in sorted(incorrect, key=lambda row: -row["prob"])[:NUM_PICTURES]:
        yield from _read_picture(row["path"], row["true_label"], row["label"], row["prob"])


def _iter_samples(labelled: LabelledFiles) -> Iterator[report.Picture]:
    """Yield pictures of each class, evenly spaced in its files."""
    true_index_N = labelled.files["true_index"].to_numpy()
    num_each = max(1, NUM_PICTURES // len(labelled.class_names))
    for i, name in enumerate(labelled.class_names[:NUM_PICTURES]):
        rows = np.flatnonzero(true_index_N == i)
        for row in rows[np.linspace(0, len(rows) - 1, min(num_each, len(rows))).astype(int)]:
            yield from _read_picture(labelled.files["path"][int(row)].as_py(), name)


def _read_picture(
    path: str, true_label: str, label: str | None = None, prob: float | None = None
) -> Iterator[report.Picture]:
    """Yield the picture at `path`, or nothing if it cannot be decoded."""
    fetched = storage.fetch([storage.Entry(path)])[0]
    image = decode_image(fetched.content).image if fetched.content else None
    if image is not None:
        yield report.Picture(path=path, image=image, true_label=true_label, label=label, prob=prob)
