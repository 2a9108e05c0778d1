"""Time catsdogs and its peers in turn, and write docs/benchmarks.md.

python -m benchmarks.speed --images data/cats_and_dogs_filtered --weights imagenet
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.speed.agreement import check_agreement
from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import CLASS_NAMES, DECODERS, IN_MEMORY, NOTEBOOK, OURS, SCORING, TRAINERS
from benchmarks.speed.growth import check_growth
from benchmarks.speed.page import read_revision, write_page
from benchmarks.speed.profiles import write_profiles
from benchmarks.speed.protocol import DEVICE
from benchmarks.speed.timing import Timing
from catsdogs.checkpoint import write_checkpoint
from catsdogs.images import Preprocessing
from catsdogs.resnet import build_resnet50
from catsdogs.weights import load_pretrained

ALL_IMAGES = 3000  # or as many as there are
ROUNDS, FULL_ROUNDS = 3, 5
MAX_START_S, MAX_MINUTES = 20, 60


def main() -> int:
    """Run every round; 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="3,000 photographs in train/ and validation/")
    parser.add_argument("--weights", default="imagenet", help="as of catsdogs train")
    parser.add_argument("--full", action="store_true", help="five rounds on all images instead of three on some")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    if DEVICE.type != "cpu":
        parser.error("found a GPU: hide it with CUDA_VISIBLE_DEVICES=, or run python -m benchmarks.speed.gpu")
    start, revision = time.monotonic(), read_revision()
    contestants = [*SCORING, *DECODERS, *TRAINERS, *NOTEBOOK]
    if options.full:
        contestants = [c if c in IN_MEMORY else replace(c, num_images=ALL_IMAGES) for c in contestants]
    timings: dict[str, list[Timing]] = {contestant.name: [] for contestant in contestants}
    with tempfile.TemporaryDirectory(prefix="catsdogs-") as name:
        work = Path(name)
        model = build_resnet50(num_classes=len(CLASS_NAMES), seed=0)
        load_pretrained(model, options.weights, CLASS_NAMES)
        write_checkpoint(str(work / "model"), model.state_dict(), CLASS_NAMES, Preprocessing())
        for _ in range(FULL_ROUNDS if options.full else ROUNDS):
            for contestant in contestants:
                timings[contestant.name].append(contestant.run(options.images, work / "model", work))
                print(f"{contestant.name}: {timings[contestant.name][-1]}", flush=True)
            write_page(options.page, contestants, timings, (), revision)  # of the rounds so far
        checks = Checks()
        start_s = median(timing.start_s for timing in timings[OURS])
        checks.add(
            f"`score`, from the command to its first batch: {start_s:.1f} s (goal: {MAX_START_S} s).",
            start_s < MAX_START_S,
        )
        check_agreement(checks, options.images, work)
        check_growth(checks, options.images, work / "model", work, timings)
        profiles = write_profiles(options.images, work / "model", work)
    if not options.full:
        minutes = (time.monotonic() - start) / 60
        checks.add(f"All of this took {minutes:.0f} minutes (goal: {MAX_MINUTES}).", minutes < MAX_MINUTES)
    write_page(options.page, contestants, timings, (checks.format_section(), profiles), revision)
    return 1 if checks.missed else 0


if __name__ == "__main__":
    sys.exit(main())
