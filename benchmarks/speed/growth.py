"""How time and memory of `score` grow with the number of images; the speed of two actors and of two workers."""

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
import psutil
import pyarrow.parquet as pq

from benchmarks.faults.store import BUCKET, Store
from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import SCORING, TRAINERS, Contestant, copy_sample
from benchmarks.speed.timing import Timing

COUNTS = (375, 750, 1500, 3000)
NUM_ON_S3 = 375  # images
MAX_RESIDUAL, MAX_MEMORY_RATIO, MIN_RATE_RATIO = 0.05, 1.1, 0.9
SAMPLE_S = 2.0  # reading the memory of all processes slows the command down


def check_growth(
    checks: Checks, images: Path, checkpoint: Path, work: Path, timings: Mapping[str, Sequence[Timing]]
) -> None:
    """Score more and more images, also from S3; compare two actors and two workers with the one of `timings`."""
    walls_s, memories, complete = [], [], []
    for count in COUNTS:
        contestant = replace(SCORING[0], num_images=count)
        with MemoryWatch() as memory:
            timing = contestant.run(images, checkpoint, work)
        complete.append(_is_complete(work / "out", count))
        walls_s.append(timing.wall_s)
        memories.append(memory.max_bytes)
        print(f"growth: {count} images, {timing}, {memory.max_bytes / 2**30:.2f} GiB", flush=True)
    _check_time(checks, walls_s)
    ratio = memories[-1] / memories[0]
    checks.add(
        f"Memory of {COUNTS[-1]:,} images / of {COUNTS[0]}: {memories[-1] / 2**30:.2f} GiB / "
        f"{memories[0] / 2**30:.2f} GiB = {ratio:.2f} (goal: at most {MAX_MEMORY_RATIO}); of all processes.",
        ratio <= MAX_MEMORY_RATIO,
    )
    checks.add("Rows, parts and listed files: the expected number at each size.", all(complete))
    _check_requests(checks, images, checkpoint, work)
    scoring = replace(SCORING[0], num_images=750, command=(*SCORING[0].command, "--num-actors", "2"))
    command = (*TRAINERS[0].command, "--num-workers", "2", "--batch-size", "16")
    training = replace(TRAINERS[0], num_images=320, command=command)
    for what, contestant in (("Two actors of one thread", scoring), ("Two workers of one thread", training)):
        _check_share(checks, what, contestant.run(images, checkpoint, work), contestant, timings)


def _check_time(checks: Checks, walls_s: Sequence[float]) -> None:
    """Fit start-up + images / rate to the wall times."""
    slope, start = np.polyfit(COUNTS, walls_s, 1)
    fitted = start + slope * np.array(COUNTS)
    residual = float((np.abs(walls_s - fitted) / walls_s).max())
    seconds = ", ".join(f"{count:,}: {wall:.1f} s" for count, wall in zip(COUNTS, walls_s, strict=True))
    checks.add(
        f"The whole command, {seconds}: {start:.1f} s + N / {1 / slope:.1f}, at most {residual:.1%} off "
        f"(goal: {MAX_RESIDUAL:.0%}).",
        residual <= MAX_RESIDUAL,
    )


def _check_requests(checks: Checks, images: Path, checkpoint: Path, work: Path) -> None:
    folder = copy_sample(images, NUM_ON_S3, work / f"s3-{NUM_ON_S3}")
    with Store(folder) as store:
        store.proxy.reset()
        command = SCORING[0].format_command(f"s3://{BUCKET}/in", checkpoint, f"s3://{BUCKET}/out")
        subprocess.run(command, env=os.environ | store.environment, check=True, stdout=subprocess.DEVNULL)
        gets, heads = store.proxy.counts.by_kind["image"], store.proxy.counts.by_kind["head"]
    checks.add(
        f"Requests for {NUM_ON_S3} images on S3: {gets} GET of an image; {heads} HEAD, of the output's own files.",
        gets == NUM_ON_S3 and heads < NUM_ON_S3 // 10,
    )


def _check_share(
    checks: Checks, what: str, two: Timing, contestant: Contestant, timings: Mapping[str, Sequence[Timing]]
) -> None:
    one = median(timing.rate for timing in timings[contestant.name])
    checks.add(
        f"{what}: {two.rate:.1f} img/s, {two.rate / one:.2f} of one with two threads (goal: {MIN_RATE_RATIO}).",
        two.rate >= MIN_RATE_RATIO * one,
    )


def _is_complete(output: Path, count: int) -> bool:
    summary = json.loads((output / "_summary.json").read_text())
    parts = list(output.glob("part-*.parquet"))
    rows = sum(pq.read_metadata(part).num_rows for part in parts)
    return (summary["listed"], rows, len(parts)) == (count, count, 1)


class MemoryWatch:
    """Watches the memory of all children of this process; `max_bytes` is the maximum."""

    def __enter__(self) -> Self:
        """Start a thread that watches."""
        self.max_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            children = psutil.Process().children(recursive=True)
            self.max_bytes = max(self.max_bytes, sum(map(_read_memory_bytes, children)))


def _read_memory_bytes(process: psutil.Process) -> int:
    """Read the PSS of a process; 0 where it has ended."""
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0
