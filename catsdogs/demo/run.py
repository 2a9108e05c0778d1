"""The demo: draw labelled images, then train, evaluate and score in one process with one Ray; write a report."""

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import yaml
from PIL import Image

from catsdogs import report, storage
from catsdogs.config import DemoConfig, EvaluateConfig, ScoreConfig, TrainConfig
from catsdogs.demo.drawings import KINDS, draw, draw_dataset
from catsdogs.errors import InputError
from catsdogs.evaluate import evaluate
from catsdogs.progress import Message, Progress, silent
from catsdogs.schema import OK
from catsdogs.score import score
from catsdogs.train import train

NUM_TRAIN, NUM_VALIDATION, NUM_UNLABELLED = 1600, 200, 60
SHOWN_PER_CLASS = 12  # images in the report
# From random weights to a validation accuracy of 0.985 with seed 0 (measured: 2 cores, 2026-11-26).
RECIPE: dict[str, Any] = {
    "weights": "none",
    "img_size": 48,
    "epochs": 4,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 0.5,
    "label_smoothing": 0.0,
    "augment": "none",
}


def demo(config: DemoConfig, progress: Progress = silent) -> str:
    """Run every step in `config.output` and return a table of the results.

    Raises:
        InputError: the output is not empty.
        RunError: a step failed; the outputs of earlier steps are kept.
    """
    output = storage.absolute(config.output)
    if not storage.is_local(output) or storage.list_names(output):
        raise InputError(f"--output {config.output}: expected a new or empty local folder; choose another or remove it")
    folder = Path(os.fsdecode(storage.local_path(output)))
    steps: list[tuple[str, str, str, float]] = []

    def run_step(name: str, file: str, work: Callable[[], str]) -> None:
        progress(Message(f"--- {name}"))
        started_s = time.monotonic()
        result = work()
        steps.append((name, result, str(folder / file), time.monotonic() - started_s))

    checkpoint = str(folder / "run" / "best")
    run_step("draw", "data", lambda: _draw(folder / "data", config.seed, progress))
    run_step("train", "run", lambda: _train(folder, config.seed, progress))
    run_step("evaluate", "evaluation", lambda: _evaluate(folder, checkpoint, progress))
    run_step("score", "scores", lambda: _score(folder, checkpoint, progress))
    run_step("report", "report.html", lambda: _write_report(folder))
    return _format_table(steps)


def _draw(folder: Path, seed: int, progress: Progress) -> str:
    draw_dataset(folder, num_train=NUM_TRAIN, num_validation=NUM_VALIDATION, seed=seed, progress=progress)
    draw_unlabelled(folder / "unlabelled", seed)
    return f"{NUM_TRAIN + NUM_VALIDATION:,} labelled and {NUM_UNLABELLED} unlabelled images, 4 broken files"


def draw_unlabelled(folder: Path, seed: int) -> None:
    """Draw images in one folder and write typical broken files: empty, truncated, a web page, damaged."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(KINDS)])
    for i in range(NUM_UNLABELLED):
        draw(KINDS[i % 2], rng).save(folder / f"image.{i:03}.jpg", quality=90)
    whole = (folder / "image.000.jpg").read_bytes()
    draw(KINDS[0], rng).save(folder / "damaged.png")
    damaged = bytearray((folder / "damaged.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "damaged.png").write_bytes(damaged)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut off.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "web page.jpg").write_bytes(b"<!doctype html><title>404</title>")


def _train(folder: Path, seed: int, progress: Progress) -> str:
    config = TrainConfig(data_dir=str(folder / "data"), storage_path=str(folder), name="run", seed=seed, **RECIPE)
    result = train(config, progress)
    return f"validation accuracy {result.val_accuracy:.4f} in epoch {result.best_epoch} of {config.epochs}"


def _evaluate(folder: Path, checkpoint: str, progress: Progress) -> str:
    config = EvaluateConfig(data_dir=str(folder / "data"), checkpoint=checkpoint, output=str(folder / "evaluation"))
    metrics = evaluate(config, progress)
    low, high = metrics["accuracy_interval_95"]
    return f"accuracy {metrics['accuracy']:.4f} on {metrics['n']} images (95% interval {low:.3f} to {high:.3f})"


def _score(folder: Path, checkpoint: str, progress: Progress) -> str:
    unlabelled = str(folder / "data" / "unlabelled")
    summary = score(ScoreConfig(input=unlabelled, checkpoint=checkpoint, output=str(folder / "scores")), progress)
    rows, num_ok = summary["rows"], summary["by_status"].get(OK, 0)
    return f"{rows} rows for {summary['listed']} files: {num_ok} classified, {rows - num_ok} failed"


def _write_report(folder: Path) -> str:
    """Write `report.html` from the files in the folder of the demo; return a summary for the table of steps."""
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    summary = json.loads((folder / "scores" / "_summary.json").read_text())
    rows = ds.dataset(sorted((folder / "scores").glob("part-*.parquet"))).to_table().to_pylist()
    with (folder / "run" / "summary.csv").open() as file:
        history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    facts = {
        "accuracy": f"{metrics['accuracy']:.4f}",
        "images evaluated": f"{metrics['n']:,}",
        "other files scored": f"{summary['rows']:,}",
        "training img/s": f"{history[-1]['images_per_s']:.0f}",
    }
    failed = [(row["path"], row["status"], row["error"]) for row in rows if row["status"] != OK]
    others = f"{summary['rows']:,} other files"
    matrix = report.confusion_matrix(metrics["class_names"], metrics["confusion_matrix"], metrics["failed_by_class"])
    sections = [
        report.facts(facts),
        report.curves(history),
        replace(matrix, title=f"Confusion of {metrics['n']:,} validation images"),
        report.dataset_grid(list(_read_pictures(folder / "data" / "train"))),
        replace(report.label_counts(summary["by_label"]), title=f"Predictions for {others}"),
        replace(report.failures(summary["by_status"], failed), title=f"Failures among {others}"),
        report.settings(yaml.safe_load((folder / "run" / "args.yaml").read_text())),
    ]
    page = report.page("Demo", sections, subtitle=str(folder))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return f"{len(sections)} sections"


def _read_pictures(root: Path) -> Iterator[report.Picture]:
    for label in sorted(root.iterdir()):
        for path in sorted(label.iterdir())[:SHOWN_PER_CLASS]:
            with Image.open(path) as image:
                yield report.Picture(path=str(path), image=np.asarray(image.convert("RGB")), true_label=label.name)


def _format_table(steps: list[tuple[str, str, str, float]]) -> str:
    width = max(len(result) for _, result, _, _ in steps)
    where = max(len(path) for _, _, path, _ in steps)
    lines = [f"{'step':8}  {'result':{width}}  {'where':{where}}  seconds"]
    lines += [f"{name:8}  {result:{width}}  {path:{where}}  {seconds:7.0f}" for name, result, path, seconds in steps]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
