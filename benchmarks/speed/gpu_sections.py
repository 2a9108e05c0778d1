"""The sections of `benchmarks.speed.gpu`, each in a separate process."""

import argparse
import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.speed import gpu_names as names
from benchmarks.speed.agreement import compare_predictions, read_predictions
from benchmarks.speed.contestants import CATSDOGS, SCORE, link_or_copy, module_command
from benchmarks.speed.timing import kill_tree, time_command

EPOCH = re.compile(r"epoch (\d+)/")
# The command is not installed where the package runs from a folder.
COMMAND = (CATSDOGS,) if Path(CATSDOGS).exists() else (sys.executable, "-c", "from catsdogs.cli import main; main()")
ON_CPUS = (sys.executable, "-m", "benchmarks.speed.ours.cpu_decoding")
END_S = 20.0  # for a command to end after Ctrl-C


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        scored, loaded, compared: images that are classified.
        trained: images per epoch of training, copies of the photographs.
        scratch: options of training from scratch.
        checked: steps that are compared, and their batch size.
    """

    scored: int = 120_000
    loaded: int = 12_000
    compared: int = 12_000
    trained: int = 24_000
    epochs: int = 100  # of training; after `last_epoch` the command is ended
    last_epoch: int = 4
    img_size: int = 224
    scratch: tuple[str, ...] = ("--epochs", "200")
    checked: tuple[int, int] = (20, 32)


SMOKE = Sizes(48, 32, 16, 48, 3, 2, 32, ("--epochs", "2", "--img-size", "32"), (6, 4))


@dataclass(frozen=True)
class Section:
    """The photographs, a folder for files, and the sizes."""

    images: Path
    work: Path
    sizes: Sizes

    def copy(self, source: str, count: int, name: str) -> Path:
        """Link photographs of a folder again and again until there are `count`, of all classes, by class."""
        folder, found = self.work / name, sorted((self.images / source).rglob("*.jpg"))
        random.Random(0).shuffle(found)
        for i in range(count if not folder.exists() else 0):
            path = found[i % len(found)]
            link_or_copy(path, folder / path.parent.name / f"{i:06}.jpg")
        return folder


def report(figure: str, value: float, **more: object) -> None:
    """Print a figure, so that nothing is lost if the machine is taken away; 0 if it was not seen."""
    print(json.dumps({"figure": figure, "value": 0.0 if math.isnan(value) else round(value, 4), **more}), flush=True)


def _score(section: Section) -> None:
    folder = section.copy(".", section.sizes.scored, "images")
    _time_scoring(section, folder, (*COMMAND, *SCORE), "out", names.SCORE_RATE)


def _loader(section: Section) -> None:
    folder = section.copy(".", section.sizes.loaded, "loaded")
    _time_scoring(section, folder, module_command("peers.loader", "--tuned"), "loaded.parquet", names.LOADER_RATE)


def _time_scoring(section: Section, folder: Path, command: tuple[str, ...], output: str, figure: str) -> None:
    words = {"images": folder, "checkpoint": section.work / "model", "output": section.work / output}
    timing = time_command([word.format(**words) for word in command], section.work)
    report(figure, timing.rate, start_s=round(timing.start_s, 1), wall_s=round(timing.wall_s, 1))


def _labels(section: Section) -> None:
    folder, command = section.copy(".", section.sizes.compared, "compared"), (*ON_CPUS, *SCORE)
    _time_scoring(section, folder, command, "out-cpus", "`catsdogs score`, decoding on CPUs, img/s")
    on_gpu, on_cpus = (read_predictions(section.work / name) for name in ("out", "out-cpus"))
    same, difference = compare_predictions(on_gpu, on_cpus)
    report("labels that are the same, decoding on the GPU and on CPUs", same, goal=0.995, images=on_cpus.num_rows)
    report("difference of their probabilities, maximum", difference)


def _train(section: Section) -> None:
    _time_training(section, "train", names.TRAIN_RATE, ())


def _train_in_batches_of_32(section: Section) -> None:
    _time_training(section, "train32", names.TRAIN32_RATE, ("--batch-size", "32"))
    from benchmarks.speed.gpu_steps import measure_eager_step  # torch, beside the command, would take memory

    report(names.EAGER32_RATE, measure_eager_step(32, section.sizes.img_size))


def _time_training(section: Section, name: str, figure: str, more: tuple[str, ...]) -> None:
    """Train until an epoch's line, then end the command: the rate is that of the epochs after the first."""
    sizes = section.sizes
    data_dir = _copy_training_images(section)
    flags = ("--epochs", str(sizes.epochs), "--img-size", str(sizes.img_size), *more)

    def is_done(epoch: int, _: float) -> bool:
        return epoch >= sizes.last_epoch

    run = _run_training(section, name, data_dir, flags, is_done)
    rows = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))[1:]
    rates = [float(row["images_per_s"]) for row in rows]
    seconds = sum(float(row["seconds"]) for row in rows)
    args = yaml.safe_load((run / "args.yaml").read_text())
    facts = {"batch_size": args["batch_size"], "precision": args["precision"], "epochs": len(rows)}
    report(figure, sum(rates) / len(rates), **facts)
    report(f"{figure}, with validation and saving", sizes.trained * len(rows) / seconds)


def _copy_training_images(section: Section) -> Path:
    section.copy("train", section.sizes.trained, "data/train")
    section.copy("validation", min(128, section.sizes.trained), "data/validation")
    return section.work / "data"


def _scratch(section: Section) -> None:
    started = time.monotonic()
    data_dir = _copy_training_images(section) if section.sizes == SMOKE else section.images

    def report_epoch(epoch: int, _: float) -> bool:
        if epoch % 10 == 0 or section.sizes == SMOKE:
            rows = list(csv.DictReader((section.work / "runs/scratch/summary.csv").read_text().splitlines()))
            best = max(float(row["val_accuracy"]) for row in rows)
            minutes = (time.monotonic() - started) / 60
            report("from scratch on the photographs: best accuracy", best, epoch=epoch, minutes=round(minutes, 2))
        return False

    _run_training(section, "scratch", data_dir, section.sizes.scratch, report_epoch)


def _run_training(
    section: Section, name: str, data_dir: Path, flags: tuple[str, ...], on_epoch: Callable[[int, float], bool]
) -> Path:
    """Run `catsdogs train` from random weights until it ends or `on_epoch` returns True; return the run's folder."""
    storage, started = section.work / "runs", time.monotonic()
    places = ("--data-dir", str(data_dir), "--storage-path", str(storage), "--name", name)
    command = [*COMMAND, "train", *places, "--weights", "none", *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(json.dumps({"line": line.strip()[:300], "s": round(time.monotonic() - started, 1)}), flush=True)
            found = EPOCH.match(line)
            if found and on_epoch(int(found[1]), time.monotonic() - started):
                break
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
    return storage / name


def _checks(section: Section) -> None:
    from benchmarks.speed import gpu_checks

    for figure, value in gpu_checks.run_checks(section.sizes.img_size, section.sizes.checked):
        report(figure, value)


def _steps(section: Section) -> None:
    from benchmarks.speed import gpu_steps

    for figure, value in gpu_steps.measure(section.images, section.sizes.img_size, is_smoke=section.sizes == SMOKE):
        report(figure, value)


SECTIONS: Mapping[str, Callable[[Section], None]] = {
    "score": _score,
    "loader": _loader,
    "train": _train,
    "train32": _train_in_batches_of_32,
    "labels": _labels,
    "checks": _checks,
    "steps": _steps,
    "scratch": _scratch,
}


def main() -> None:
    """Run one section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    SECTIONS[options.section](Section(options.images, options.work, SMOKE if options.smoke else Sizes()))


if __name__ == "__main__":
    main()
