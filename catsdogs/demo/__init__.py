"""The demo: draws labelled pictures, then the real commands in order, on one Ray.

drawings.py   the pictures it draws
page.py       what every step left -> one page
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from catsdogs import storage
from catsdogs.config import DemoConfig, EvaluateConfig, ScoreConfig, TrainConfig
from catsdogs.demo.drawings import KINDS, draw, draw_dataset
from catsdogs.demo.page import write_page
from catsdogs.errors import InputError
from catsdogs.evaluate import evaluate
from catsdogs.progress import Message, Progress, StageProgress, silent
from catsdogs.score import score
from catsdogs.start import start_ray
from catsdogs.train import train

NUM_TRAIN, NUM_VALIDATION, NUM_UNLABELLED = 1600, 200, 60
# measured: 2 cores, 2026-11-23; from random weights to 0.985 or more of the held-out drawings for six seeds of six
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
    """Do the whole job in `config.output`; a table of what was done and where it is.

    Raises:
        InputError: the output is not empty.
        RunError: a step failed; what was done before is kept.
    """
    output = storage.absolute(config.output)
    if not storage.is_local(output) or storage.list_names(output):
        raise InputError(
            f"--output {config.output}: expected an empty or new local folder; choose another or remove it"
        )
    folder = Path(os.fsdecode(storage.local_path(output)))
    steps: list[tuple[str, str, str, float]] = []

    def step(name: str, place: str, work: Callable[[], str]) -> None:
        progress(Message(f"--- {name}"))
        started = time.monotonic()
        outcome = work()
        steps.append((name, outcome, str(folder / place), time.monotonic() - started))

    checkpoint = str(folder / "run" / "best")
    step("draw", "data", lambda: _draw(folder / "data", config.seed, progress))
    start_ray()
    step("train", "run", lambda: _train(folder, config.seed, progress))
    step("evaluate", "evaluation", lambda: _evaluate(folder, checkpoint, progress))
    step("score", "scores", lambda: _score(folder, checkpoint, progress))
    step("report", "report.html", lambda: write_page(folder))
    return _table(steps)


def _draw(folder: Path, seed: int, progress: Progress) -> str:
    draw_dataset(
        folder,
        num_train=NUM_TRAIN,
        num_validation=NUM_VALIDATION,
        seed=seed,
        progress=lambda done, total: progress(StageProgress("draw", done, total)),
    )
    _draw_unlabelled(folder / "unlabelled", seed)
    return f"{NUM_TRAIN + NUM_VALIDATION:,} labelled and {NUM_UNLABELLED} unlabelled pictures, 4 broken files"


def _draw_unlabelled(folder: Path, seed: int) -> None:
    """Draw pictures without labels, and files as they turn up in every bucket: empty, cut off, a web page, damaged."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(KINDS)])
    for i in range(NUM_UNLABELLED):
        draw(KINDS[i % 2], rng).save(folder / f"picture.{i:03}.jpg", quality=90)
    whole = (folder / "picture.000.jpg").read_bytes()
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
    return f"accuracy {metrics['accuracy']:.4f} ({low:.3f} to {high:.3f}) of {metrics['n']} drawings"


def _score(folder: Path, checkpoint: str, progress: Progress) -> str:
    config = ScoreConfig(
        input=str(folder / "data" / "unlabelled"), checkpoint=checkpoint, output=str(folder / "scores")
    )
    summary = score(config, progress)
    failed = summary["rows"] - summary["by_status"].get("ok", 0)
    return f"{summary['rows']} rows for {summary['listed']} files, {failed} without a label and with the reason"


def _table(steps: list[tuple[str, str, str, float]]) -> str:
    rows = [("step", "result", "where", "seconds"), *((n, o, p, f"{s:.0f}") for n, o, p, s in steps)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3].rjust(7)])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
