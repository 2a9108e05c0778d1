"""Timings -> docs/benchmarks.md."""

import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.machine import machine
from benchmarks.speed.contestants import DECODERS, NOTEBOOK, SCORING, TRAINERS, Contestant
from benchmarks.speed.goals import GOALS
from benchmarks.speed.timing import Timing

PACKAGES = ("torch", "torchvision", "ray", "timm", "daft", "pillow")
INTRODUCTION = """# Benchmarks

How fast catsdogs is, beside what people run instead. Made by `{command}`: every command in turn, {rounds} rounds, all
of them on the same photographs, the same weights and the same cores; the median, with the lowest and the highest in
brackets. Ratios are what carries over to another machine.

- Steady rate: from the first batch to the last, in batches of 32 at 224 px.
- Start-up: from the command to its first batch done; every command's own.
- Tuned: what an expert would change in the same loop: bf16, channels last, one loading process.

Machine: {machine}; {when} UTC; revision {revision}. On a GPU: [benchmarks-gpu.md](benchmarks-gpu.md).
"""
NOTES = {
    "Scoring": "Our model alone labels the same decoded batch again and again; the roofline is the rate that the "
    "machine's products of matrices in bf16 would allow (8.18 GFLOP an image). Ray gives a process as many threads as "
    "it reserves CPUs, one in its documentation's examples; tuned, the model has them all.",
    "Decoding and resizing, one core": "From the bytes of a file to 224 x 224 pixels. The weights' transforms also "
    "normalize, which ours leaves to the model's stage, a batch at once: it is in the rates of scoring.",
    "Training all layers": "Random resized crop and flip, SGD, global batch of 32; a step with all that feeds it. Of "
    "the images of `catsdogs train` a tenth validates. Ray's example makes 3 steps, the other loops 10.",
    "The notebook's experiment": "A frozen backbone, no augmentation, 2,000 images to train and 1,000 to validate. The "
    "loop ran one epoch; ten of them are its start-up and ten times the rest.",
}
HEAD = ("command", "images", "steady rate, img/s", "beside the first", "start-up, s", "whole command, s")
GOALS_HEAD = ("ratio", "asked", "aim", "reached", "")


def write_page(
    path: Path,
    contestants: Sequence[Contestant],
    timings: Mapping[str, Sequence[Timing]],
    closing: Sequence[str],
    revision: str,
) -> None:
    """Write the page from what was timed, and `closing`, its last sections."""
    origin = origin_of("benchmarks.speed", PACKAGES, revision)
    introduction = INTRODUCTION.format(rounds=len(next(iter(timings.values()))), **origin)
    sections = [introduction, "## What is asked for\n", table(GOALS_HEAD, (goal.row(timings) for goal in GOALS))]
    num_images = {contestant.name: contestant.num_images for contestant in contestants}
    for (title, note), group in zip(NOTES.items(), (SCORING, DECODERS, TRAINERS, NOTEBOOK), strict=True):
        first = timings[group[0].name]
        rows = [row(name, num_images[name], timings[name], first) for name in (one.name for one in group)]
        sections += [f"## {title}\n", f"{note}\n", table(HEAD, rows)]
    path.write_text("\n".join([*sections, *closing]))


def origin_of(module: str, packages: Iterable[str], revision: str) -> dict[str, str]:
    """Say by which command a page is made, on which machine, when, of which revision."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "machine": machine(packages),
        "when": datetime.now(UTC).isoformat(timespec="minutes")[:16],
        "revision": revision,
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay rows out."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def row(name: str, num_images: int, timings: Sequence[Timing], first: Sequence[Timing]) -> list[str]:
    """Lay a contestant out under HEAD, beside the first."""
    rates, starts, walls = ([getattr(timing, name) for timing in timings] for name in ("rate", "start_s", "wall_s"))
    beside = median(one.rate / other.rate for one, other in zip(timings, first, strict=True))
    share = "" if math.isnan(beside) else f"{beside:.2f}x"
    return [name, f"{num_images:,}", _spread(rates), share, _spread(starts), _spread(walls)]


def _spread(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return ""
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def read_revision() -> str:
    """Name the revision that is measured; `-dirty` where files differ from it."""
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
