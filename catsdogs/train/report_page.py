"""The page `report.html` of a finished run."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from catsdogs import data, report, storage
from catsdogs.config import TrainConfig
from catsdogs.images import MAX_PIXELS, ImageArray, Preprocessing
from catsdogs.labels import LabelledFiles
from catsdogs.metrics import MetricSums
from catsdogs.schema import OK, read_table
from catsdogs.train.run_folder import REPORT, VAL_PREDICTIONS, History, RunFolder

NUM_PICTURES = 24  # in each section
THUMBNAIL = Preprocessing(img_size=160, crop_pct=1.0)

PictureRow = tuple[str, str, str | None, float | None]  # path, true label, predicted label and its probability


def write_report(config: TrainConfig, folder: RunFolder, history: History, train_files: LabelledFiles) -> None:
    """Write `report.html` of a finished run."""
    predictions = read_table(storage.read_bytes(folder.path(VAL_PREDICTIONS)))
    best = history.rows[history.best_epoch - 1]
    sums = MetricSums.from_predictions(predictions, folder.class_names)
    facts = {
        "validation accuracy": f"{best['val_accuracy']:.4f}",
        "best epoch": f"{history.best_epoch} of {history.epoch}",
        "peak learning rate": f"{config.peak_lr:.3g}",
        "training images": f"{train_files.files.num_rows:,}",
        "validation images": f"{predictions.num_rows:,}",
        "img/s": f"{best['images_per_s']:.1f}",
    }
    mistakes, samples = _select_mistakes(predictions), _select_samples(train_files)
    images = _decode({path: None for path, *_ in mistakes + samples})
    sections = [
        report.facts(facts),
        report.curves(history.rows),
        report.confusion_matrix(folder.class_names, sums.matrix_KK, sums.failed_K.tolist()),
        report.worst_mistakes(_build_pictures(mistakes, images)),
        report.dataset_grid(_build_pictures(samples, images)),
        report.settings(dataclasses.asdict(config)),
    ]
    page = report.page(f"Training {config.name}", sections, subtitle=folder.uri)
    folder.write(page.encode(), REPORT)


def _select_mistakes(predictions: pa.Table) -> list[PictureRow]:
    """Select the incorrect predictions, the most confident first."""
    incorrect = [row for row in predictions.to_pylist() if row["status"] == OK and row["label"] != row["true_label"]]
    ordered = sorted(incorrect, key=lambda row: -row["prob"])[:NUM_PICTURES]
    return [(row["path"], row["true_label"], row["label"], row["prob"]) for row in ordered]


def _select_samples(labelled: LabelledFiles) -> list[PictureRow]:
    """Select files of each class, evenly spaced."""
    true_index_N = labelled.files["true_index"].to_numpy()
    num_each = max(1, NUM_PICTURES // len(labelled.class_names))
    selected: list[PictureRow] = []
    for i, name in enumerate(labelled.class_names[:NUM_PICTURES]):
        rows = np.flatnonzero(true_index_N == i)
        for row in rows[np.linspace(0, len(rows) - 1, min(num_each, len(rows))).astype(int)]:
            selected.append((labelled.files["path"][int(row)].as_py(), name, None, None))
    return selected


def _decode(paths: Iterable[str]) -> dict[str, ImageArray]:
    """Decode images where all others are decoded, in child processes with limits; leave out those that fail."""
    files = storage.build_files_table(storage.Entry(path) for path in paths)
    stage = data.DecodeForInference(THUMBNAIL, MAX_PIXELS, 2 * NUM_PICTURES)
    images = {}
    for rows in data.decode_files(files, stage, data.allocate_cpus(1).decode):
        images_NHWC = data.view_images(rows, THUMBNAIL.img_size)
        for path, status, image in zip(rows["path"].to_pylist(), rows["status"].to_pylist(), images_NHWC, strict=True):
            if status == OK:
                images[path] = image
    return images


def _build_pictures(rows: list[PictureRow], images: dict[str, ImageArray]) -> list[report.Picture]:
    return [
        report.Picture(path=path, image=images[path], true_label=true_label, label=label, prob=prob)
        for path, true_label, label, prob in rows
        if path in images
    ]
