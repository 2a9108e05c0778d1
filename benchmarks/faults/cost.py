"""The cost of safety without faults: CPU seconds per image of `catsdogs score` and of the same pipeline without it."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import psutil
from PIL import Image

from benchmarks.checkpoints import save_random
from benchmarks.faults.inputs import encoded
from benchmarks.faults.processes import Command

NUM_IMAGES = 1000
NUM_PAIRS = 5
POLL_S = 0.1
SIZE = (404, 360)  # the mean of the Dogs vs. Cats photographs
MAX_CPU_RATIO = 1.03  # the goal
SAFE, BARE = "catsdogs score", "the same without it"


class Run(TypedDict):
    """One measured command. Pairs run one after the other, in alternating order."""

    pair: int
    pipeline: str
    cpu_s_per_image: float
    wall_s: float


class Comparison(NamedTuple):
    """The medians of both pipelines, and the ratios SAFE / BARE of the pairs in ascending order."""

    safe: float
    bare: float
    ratios: list[float]


def measure_cost(work: Path) -> None:
    """Run what is missing of the pairs, then print the ratio of CPU seconds."""
    images, model = work / "photographs", work / "checkpoint-224"
    if not model.exists():
        _draw_images(images)
        save_random(model, ("a", "b"))
    runs = read_cost(work)
    order = [(pair, name) for pair in range(NUM_PAIRS) for name in ((SAFE, BARE) if pair % 2 else (BARE, SAFE))]
    for pair, pipeline in order[len(runs) :]:
        cpu_s, wall_s = _run_command(pipeline, images, model, work)
        runs.append({"pair": pair, "pipeline": pipeline, "cpu_s_per_image": cpu_s / NUM_IMAGES, "wall_s": wall_s})
        _results_path(work).write_text(json.dumps(runs, indent=1))
        print(runs[-1], flush=True)
    ratio = median(compare(runs, "cpu_s_per_image").ratios)
    print(f"CPU seconds per image, with safety / without: {ratio:.3f} (goal: at most {MAX_CPU_RATIO})")


def read_cost(work: Path) -> list[Run]:
    """Read the runs of earlier calls."""
    path = _results_path(work)
    return json.loads(path.read_text()) if path.exists() else []


def compare(runs: Sequence[Run], name: Literal["cpu_s_per_image", "wall_s"]) -> Comparison:
    """Compare one value of both pipelines, pair by pair."""
    safe = {run["pair"]: run[name] for run in runs if run["pipeline"] == SAFE}
    bare = {run["pair"]: run[name] for run in runs if run["pipeline"] == BARE}
    ratios = sorted(safe[pair] / bare[pair] for pair in safe)
    return Comparison(median(safe.values()), median(bare.values()), ratios)


def _results_path(work: Path) -> Path:
    return work / "cost.json"


def _draw_images(folder: Path) -> None:
    """Draw pictures that are as large as photographs, and as hard to decode."""
    folder.mkdir(exist_ok=True)
    for i in range(NUM_IMAGES):
        rng = np.random.default_rng(i)
        patches = Image.fromarray(rng.integers(0, 256, (30, 34, 3), dtype=np.uint8))
        smooth = np.asarray(patches.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        (folder / f"{i:05d}.jpg").write_bytes(encoded(picture, "JPEG", quality=88))


def _run_command(pipeline: str, images: Path, model: Path, work: Path) -> tuple[float, float]:
    """Score the images once; the CPU seconds of every process, and the wall seconds."""
    output = work / "cost-output"
    shutil.rmtree(output, ignore_errors=True)
    safe: list[object] = [Path(sys.executable).with_name("catsdogs"), "score"]
    bare: list[object] = [sys.executable, "-m", "benchmarks.faults.bare"]
    command_line = safe if pipeline == SAFE else bare
    command_line += ["--input", images, "--checkpoint", model, "--output", output]
    cpu_s: dict[tuple[int, float], float] = {}  # by process
    start = time.monotonic()
    with Command(command_line, work / "cost.log") as command:
        while command.runs_for(POLL_S):
            for process in command.processes():
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    cpu_s[process.pid, process.create_time()] = times.user + times.system
        wall_s = time.monotonic() - start
        assert command.code == 0, command.last_line()
    shutil.rmtree(output)
    return sum(cpu_s.values()), wall_s
