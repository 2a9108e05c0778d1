"""Time ours and the peers in turn; docs/benchmarks.md says what came.

python -m benchmarks.speed --images data/cats_and_dogs_filtered --weights imagenet
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.speed.agreement import note_agreement
from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import CLASS_NAMES, DECODERS, NOTEBOOK, OURS, RESIDENT, SCORING, TRAINERS
from benchmarks.speed.growth import note_growth
from benchmarks.speed.page import read_revision, write_page
from benchmarks.speed.peers.common import DEVICE
from benchmarks.speed.profiles import profiles
from benchmarks.speed.timing import Timing
from catsdogs import checkpoint
from catsdogs.images import Preprocessing
from catsdogs.model import build

ALL = 3000  # images, or as many as there are
ROUNDS, FULL_ROUNDS = 3, 5
MOST_START_S, MOST_MINUTES = 20, 60


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
    began, revision = time.monotonic(), read_revision()
    contestants = [*SCORING, *DECODERS, *TRAINERS, *NOTEBOOK]
    if options.full:
        contestants = [one if one in RESIDENT else replace(one, num_images=ALL) for one in contestants]
    found: dict[str, list[Timing]] = {contestant.name: [] for contestant in contestants}
    with tempfile.TemporaryDirectory(prefix="catsdogs-") as name:
        work = Path(name)
        model = build(num_classes=len(CLASS_NAMES), seed=0)
        checkpoint.load_pretrained(model, options.weights, CLASS_NAMES)
        checkpoint.save(str(work / "model"), model, CLASS_NAMES, Preprocessing())
        for _ in range(FULL_ROUNDS if options.full else ROUNDS):
            for contestant in contestants:
                found[contestant.name].append(contestant.run(options.images, work / "model", work))
                print(f"{contestant.name}: {found[contestant.name][-1]}", flush=True)
            write_page(options.page, contestants, found, (), revision)  # of the rounds so far
        checks = Checks()
        start_s = median(timing.start_s for timing in found[OURS])
        checks.note(
            f"`score`, from the command to its first batch: {start_s:.1f} s (asked: {MOST_START_S} s).",
            start_s < MOST_START_S,
        )
        note_agreement(checks, options.images, work)
        note_growth(checks, options.images, work / "model", work, found)
        profile = profiles(options.images, work / "model", work)
    if not options.full:
        minutes = (time.monotonic() - began) / 60
        checks.note(f"All of this took {minutes:.0f} minutes (asked: {MOST_MINUTES}).", minutes < MOST_MINUTES)
    write_page(options.page, contestants, found, (checks.section(), profile), revision)
    return 1 if checks.missed else 0


if __name__ == "__main__":
    sys.exit(main())
