"""What safety costs without faults: CPU seconds an image, beside the same pipeline without it."""

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.faults.inputs import encoded
from benchmarks.faults.processes import Command
from catsdogs import checkpoint
from catsdogs.images import Preprocessing
from catsdogs.model import build

NUM_IMAGES = 1000
NUM_PAIRS = 5
POLL_S = 0.1
SIZE = (404, 360)  # the mean of the Dogs vs. Cats photographs
SAFE, BARE = "catsdogs score", "the same without it"


def measure_cost(work: Path) -> None:
    """Run pairs that are missing, one after the other."""
    images, model = work / "photographs", work / "checkpoint-224"
    if not model.exists():
        _draw(images)
        checkpoint.save(str(model), build(num_classes=2, seed=0), ("a", "b"), Preprocessing(img_size=224))
    runs = read_cost(work)
    for pair in range(len(runs) // 2, NUM_PAIRS):
        for name in (SAFE, BARE) if pair % 2 else (BARE, SAFE):
            runs.append({"pair": pair, "pipeline": name} | _run(name, images, model, work))
            print(runs[-1], flush=True)
        _path(work).write_text(json.dumps(runs, indent=1))


def read_cost(work: Path) -> list[dict]:
    """Read the runs that are there."""
    return json.loads(_path(work).read_text()) if _path(work).exists() else []


def _path(work: Path) -> Path:
    return work / "cost.json"


def _draw(folder: Path) -> None:
    """Draw pictures as large, and as hard to decode, as photographs."""
    folder.mkdir(exist_ok=True)
    for i in range(NUM_IMAGES):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (30, 34, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (SIZE[1], SIZE[0], 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        (folder / f"{i:05d}.jpg").write_bytes(encoded(picture, "JPEG", quality=88))


def _run(name: str, images: Path, model: Path, work: Path) -> dict[str, float]:
    output = work / "cost-output"
    shutil.rmtree(output, ignore_errors=True)
    start = (
        [Path(sys.executable).with_name("catsdogs"), "score"]
        if name == SAFE
        else [sys.executable, "-m", "benchmarks.faults.bare"]
    )
    words = [*start, "--input", images, "--checkpoint", model, "--output", output]
    spent: dict[tuple[int, float], float] = {}
    began = time.monotonic()
    with Command(words, work / "cost.log") as command:
        while command.runs_for(POLL_S):
            for process in command.processes():
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    spent[process.pid, process.create_time()] = times.user + times.system
        wall_s = time.monotonic() - began
        assert command.code == 0, command.last_line()
    shutil.rmtree(output)
    return {"cpu_s_an_image": sum(spent.values()) / NUM_IMAGES, "wall_s": wall_s}
