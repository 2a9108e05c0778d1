"""The page `report.html` of a finished run."""

import dataclasses

import numpy as np
import pyarrow as pa

from catsdogs import data, report, storage
from catsdogs.calibration import LabelledProbs, compute_confidence, compute_reliability, fit_calibration
from catsdogs.checkpoint import CheckpointFiles, read_checkpoint
from catsdogs.config import TrainConfig
from catsdogs.decisions import list_coverage, measure_coverage
from catsdogs.images import ImageArray
from catsdogs.labels import LabelledFiles
from catsdogs.metrics import MetricSums
from catsdogs.predictions import FloatArray
from catsdogs.schema import OK, read_table
from catsdogs.train.run_folder import BEST, REPORT, VAL_PREDICTIONS, History, RunFolder

NUM_PICTURES = 24  # in each section

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
    pictures = _build_mistakes(mistakes, folder)
    sections = [
        report.facts(facts),
        report.curves(history.rows),
        report.confusion_matrix(folder.class_names, sums.matrix_KK, sums.failed_K.tolist()),
        *_build_calibration(predictions, folder.class_names),
        report.worst_mistakes(pictures, len(mistakes) - len(pictures)),
        report.dataset_grid(_build_samples(samples)),
        report.settings(dataclasses.asdict(config)),
    ]
    page = report.page(f"Training {config.name}", sections, subtitle=folder.uri)
    folder.write(page.encode(), REPORT)


def _build_calibration(predictions: pa.Table, class_names: tuple[str, ...]) -> list[report.Section]:
    """Build the section about the calibration of the best epoch; none if no validation image is classified."""
    calibration = fit_calibration(predictions, class_names, model_sha256="")
    if calibration is None:
        return []
    rows = LabelledProbs.from_predictions(predictions, class_names)
    before_N, after_N = (compute_confidence(rows.probs_NK, value) for value in (1.0, calibration.temperature))
    before, after = (compute_reliability(confidence_N, rows.is_correct) for confidence_N in (before_N, after_N))
    section = report.calibration(
        calibration.describe(),
        (before.confidence.tolist(), before.accuracy.tolist()),
        (after.confidence.tolist(), after.accuracy.tolist()),
        measure_coverage(after_N, rows.is_correct),
        list_coverage(calibration),
    )
    return [section]


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


def _build_samples(rows: list[PictureRow]) -> list[report.Picture]:
    images = data.decode_images([path for path, *_ in rows], data.THUMBNAIL)
    return [
        report.Picture(path=path, image=images[path], true_label=true_label)
        for path, true_label, *_ in rows
        if path in images
    ]


def _build_mistakes(rows: list[PictureRow], folder: RunFolder) -> list[report.Picture]:
    """Build pictures of what the model sees, with the class activation maps of the best epoch's model."""
    images = data.decode_images([path for path, *_ in rows], folder.preprocessing)
    shown = [row for row in rows if row[0] in images]
    if not shown:
        return []
    checkpoint = read_checkpoint(folder.path(BEST))
    images_NHWC = np.stack([images[path] for path, *_ in shown])
    (maps_NHW,) = data.map_in_tasks(_map_activations, [(checkpoint, images_NHWC)])
    return [
        report.Picture(
            path=path, image=images[path], true_label=true_label, label=label, prob=prob, activation_map=activation_map
        )
        for (path, true_label, label, prob), activation_map in zip(shown, maps_NHW, strict=True)
    ]


def _map_activations(inputs: tuple[CheckpointFiles, ImageArray]) -> FloatArray:
    """Compute class activation maps, in a Ray task."""
    import torch  # not at the top: the driver needs none

    from catsdogs.predict import Predictor

    checkpoint, images_NHWC = inputs
    predictor = Predictor(checkpoint.load_state_dict(), checkpoint.preprocessing, "fp32", torch.device("cpu"))
    return predictor.map_activations(images_NHWC)
