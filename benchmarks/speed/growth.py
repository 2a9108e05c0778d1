"""How the time and the memory of a scoring grow with its images, and what a second actor or worker is worth."""

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow.parquet as pq

from benchmarks.faults.store import BUCKET, Store
from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import SCORING, TRAINERS, Contestant, sample
from benchmarks.speed.timing import Timing

COUNTS = (375, 750, 1500, 3000)
COUNTED = 375  # images that are scored from S3
MOST_RESIDUAL, MOST_MEMORY, LEAST_SHARE = 0.05, 1.1, 0.9
SAMPLE_S = 2.0  # reading it costs the run time


def note_growth(
    checks: Checks, images: Path, checkpoint: Path, work: Path, timings: Mapping[str, Sequence[Timing]]
) -> None:
    """Score more and more images, from S3 too; then two actors and two workers beside the one of `timings`."""
    walls, memories, exact = [], [], []
    for count in COUNTS:
        contestant = replace(SCORING[0], num_images=count)
        with Memory() as memory:
            timing = contestant.run(images, checkpoint, work)
        exact.append(_is_exact(work / "out", count))
        walls.append(timing.wall_s)
        memories.append(memory.most_bytes)
        print(f"growth: {count} images, {timing}, {memory.most_bytes / 2**30:.2f} GiB", flush=True)
    _note_time(checks, walls)
    ratio = memories[-1] / memories[0]
    checks.note(
        f"Memory of {COUNTS[-1]:,} images / of {COUNTS[0]}: {memories[-1] / 2**30:.2f} GiB / "
        f"{memories[0] / 2**30:.2f} GiB = {ratio:.2f} (asked: at most {MOST_MEMORY}); of all processes.",
        ratio <= MOST_MEMORY,
    )
    checks.note("Rows, parts and listed files of each: exactly as many as they should be.", all(exact))
    _note_requests(checks, images, checkpoint, work)
    scoring = replace(SCORING[0], num_images=750, words=(*SCORING[0].words, "--num-actors", "2"))
    words = (*TRAINERS[0].words, "--num-workers", "2", "--batch-size", "16")
    training = replace(TRAINERS[0], num_images=320, words=words)
    for what, contestant in (("Two actors of one thread", scoring), ("Two workers of one thread", training)):
        _note_share(checks, what, contestant.run(images, checkpoint, work), contestant, timings)


def _note_time(checks: Checks, walls: Sequence[float]) -> None:
    slope, start = np.polyfit(COUNTS, walls, 1)
    fitted = start + slope * np.array(COUNTS)
    residual = float((np.abs(walls - fitted) / walls).max())
    seconds = ", ".join(f"{count:,}: {wall:.1f} s" for count, wall in zip(COUNTS, walls, strict=True))
    checks.note(
        f"The whole command, {seconds}: {start:.1f} s + N / {1 / slope:.1f}, at most {residual:.1%} off "
        f"(asked: {MOST_RESIDUAL:.0%}).",
        residual <= MOST_RESIDUAL,
    )


def _note_requests(checks: Checks, images: Path, checkpoint: Path, work: Path) -> None:
    folder = sample(images, COUNTED, work / f"s3-{COUNTED}")
    with Store(folder) as store:
        store.proxy.reset()
        filled = {"images": f"s3://{BUCKET}/in", "checkpoint": checkpoint, "output": f"s3://{BUCKET}/out"}
        words = [word.format(**filled) for word in SCORING[0].words]
        subprocess.run(words, env=os.environ | store.environment, check=True, stdout=subprocess.DEVNULL)
        gets, heads = store.proxy.counts.by_kind["image"], store.proxy.counts.by_kind["head"]
    checks.note(
        f"Requests for {COUNTED} images on S3: {gets} GET of an image; {heads} HEAD, of the output's own files.",
        gets == COUNTED and heads < COUNTED // 10,
    )


def _note_share(
    checks: Checks, what: str, two: Timing, contestant: Contestant, timings: Mapping[str, Sequence[Timing]]
) -> None:
    one = median(timing.rate for timing in timings[contestant.name])
    checks.note(
        f"{what}: {two.rate:.1f} img/s, {two.rate / one:.2f} of one with two threads (asked: {LEAST_SHARE}).",
        two.rate >= LEAST_SHARE * one,
    )


def _is_exact(output: Path, count: int) -> bool:
    summary = json.loads((output / "_summary.json").read_text())
    parts = list(output.glob("part-*.parquet"))
    rows = sum(pq.read_metadata(part).num_rows for part in parts)
    return (summary["listed"], rows, len(parts)) == (count, count, 1)


class Memory:
    """Watches the memory of this process's children while the context lasts."""

    def __enter__(self) -> "Memory":
        """Begin."""
        self.most_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            children = psutil.Process().children(recursive=True)
            self.most_bytes = max(self.most_bytes, sum(map(_bytes_of, children)))


def _bytes_of(process: psutil.Process) -> int:
    """Count a process's memory, what it shares in parts; 0 for one that ended."""
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0
