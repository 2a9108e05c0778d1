"""Timings -> docs/benchmarks.md."""

import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.machine import describe_machine
from benchmarks.speed.contestants import DECODERS, NOTEBOOK, SCORING, TRAINERS, Contestant
from benchmarks.speed.goals import GOALS
from benchmarks.speed.timing import Timing

PACKAGES = ("torch", "simplejpeg", "torchvision", "ray", "timm", "daft", "openvino", "pillow")
INTRODUCTION = """# Benchmarks

The speed of catsdogs and of its alternatives. Made by `{command}`: every command in turn, {rounds} rounds, all on the
same photographs, weights and cores. Figures are medians, with the lowest and the highest in brackets. Compare ratios:
they change less from machine to machine than rates do.

- Steady rate: from the first batch to the last, in batches of 32 at 224 px.
- Start-up: from the start of the command to the end of its first batch.
- The notebook: a Keras tutorial that trains a new head on a frozen ResNet50 for 10 epochs.
- Tuned: the same loop with an expert's changes: bf16, channels last, one loading process.

Machine: {machine}; {when} UTC; revision {revision}. On a GPU: [benchmarks-gpu.md](benchmarks-gpu.md).
"""
NOTES = {
    "Scoring": "Our model alone classifies one decoded batch again and again. The roofline is the rate at which this "
    "machine would classify if it only multiplied matrices in bf16: 8.17 GFLOP per image, counted by "
    "`torch.utils.flop_counter`. OpenVINO classifies the same batch, from uint8 to probabilities; tuned, in bf16 and "
    "its throughput mode. Ray gives a process one thread per reserved CPU, which is one in its documentation's "
    "examples; tuned, the model uses all cores.",
    "Decoding and resizing, one core": "From the bytes of a file to 224 x 224 pixels. The weights' transforms also "
    "normalize; ours normalizes whole batches in the model's stage, which the rates of scoring include. "
    "libjpeg-turbo (simplejpeg) and torch's antialiased bilinear resize give the same pixels. They decode JPEGs only, "
    "and neither apply the EXIF orientation nor check for missing data.",
    "Training all layers": "Random resized crop and flip, SGD, global batch of 32; the rate includes reading and "
    "decoding, except for our training step alone, on a batch in memory. A step has three times the operations of the "
    "forward pass. `catsdogs train` validates on a tenth of its images. Ray's example runs 3 steps, torchvision's loop "
    "5, and tuned 10.",
    "The notebook's experiment": "A frozen backbone, no augmentation, 2,000 images to train and 1,000 to validate. The "
    "loop ran one epoch; the ratio counts its start-up once and the rest ten times.",
}
HEAD = ("command", "images", "steady rate, img/s", "relative to the first", "start-up, s", "whole command, s")
GOALS_HEAD = ("ratio", "goal", "target", "reached", "")


def write_page(
    path: Path,
    contestants: Sequence[Contestant],
    timings: Mapping[str, Sequence[Timing]],
    closing: Sequence[str],
    revision: str,
) -> None:
    """Write the page: goals, timings, then the sections `closing`."""
    origin = describe_origin("benchmarks.speed", PACKAGES, revision)
    introduction = INTRODUCTION.format(rounds=len(next(iter(timings.values()))), **origin)
    sections = [introduction, "## Goals\n", format_table(GOALS_HEAD, (goal.format_row(timings) for goal in GOALS))]
    num_images = {contestant.name: contestant.num_images for contestant in contestants}
    for (title, note), group in zip(NOTES.items(), (SCORING, DECODERS, TRAINERS, NOTEBOOK), strict=True):
        first = timings[group[0].name]
        names = [contestant.name for contestant in group]
        rows = [format_row(name, num_images[name], timings[name], first) for name in names]
        sections += [f"## {title}\n", f"{note}\n", format_table(HEAD, rows)]
    path.write_text("\n".join([*sections, *closing]))


def describe_origin(module: str, packages: Iterable[str], revision: str) -> dict[str, str]:
    """Describe the command, the machine, the time and the revision of a page."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "machine": describe_machine(packages),
        "when": datetime.now(UTC).isoformat(timespec="minutes")[:16],
        "revision": revision,
    }


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows as a table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def format_row(name: str, num_images: int, timings: Sequence[Timing], first: Sequence[Timing]) -> list[str]:
    """Format the timings of one contestant under HEAD, compared with the first of its group."""
    rates, starts, walls = ([getattr(timing, name) for timing in timings] for name in ("rate", "start_s", "wall_s"))
    ratio = median(timing.rate / other.rate for timing, other in zip(timings, first, strict=True))
    share = "" if math.isnan(ratio) else f"{ratio:.2f}x"
    return [name, f"{num_images:,}", _spread(rates), share, _spread(starts), _spread(walls)]


def _spread(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return ""
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def read_revision() -> str:
    """Read the revision that is measured; `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
