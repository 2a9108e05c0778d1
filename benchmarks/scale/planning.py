"""Seconds to plan a shard, and the memory of the driver, at 10,000 and at 100,000 shards.

Each plan is made in a separate process, and its manifests are written one at a time: with more threads, the CPU time
depends on how often they wait for the interpreter.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.scale.generated import FOLDER, GeneratedListing
from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.lease import Lease
from catsdogs.progress import silent
from catsdogs.score import threads
from catsdogs.score.listing import PlanUpdate
from catsdogs.score.plan import Plan

SMALL, LARGE = 10_000, 100_000  # shards of one file
REPEATS = 2  # of the small plan, before and after the large one
MAX_RATIO = 1.2


def check_planning(work: Path) -> Iterator[tuple[str, bool]]:
    """Compare the seconds a shard of two plans."""
    small = [_measure(work, SMALL) for _ in range(REPEATS)]
    large = _measure(work, LARGE)
    small += [_measure(work, SMALL) for _ in range(REPEATS)]
    small_ms, large_ms = median(_cpu_ms(found) for found in small), _cpu_ms(large)
    ratio = large_ms / small_ms
    yield (
        f"Planning, CPU time a shard at {LARGE:,} / at {SMALL:,} shards: {large_ms:.3f} ms / {small_ms:.3f} ms = "
        f"{ratio:.2f} (goal: at most {MAX_RATIO}); {large['wall_s']:.0f} s and {large['max_bytes'] / 2**20:.0f} MiB "
        f"in all, {median(found['max_bytes'] for found in small) / 2**20:.0f} MiB at {SMALL:,}.",
        ratio <= MAX_RATIO,
    )


def _cpu_ms(found: dict[str, Any]) -> float:
    return 1000 * float(found["cpu_s"]) / int(found["shards"])


def _measure(work: Path, num_shards: int) -> dict[str, Any]:
    output = work / "planning"
    command = [sys.executable, "-m", "benchmarks.scale.planning", str(output), str(num_shards)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    shutil.rmtree(output)
    return found


def read_max_bytes() -> int:
    """Read the maximum memory of this process; `ru_maxrss` would include that of the process which started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _plan(output: str, num_shards: int) -> None:
    storage.Listing = GeneratedListing  # type: ignore[misc]
    GeneratedListing.num_generated = num_shards
    threads.MAX_WRITES = 1
    config = ScoreConfig(input=FOLDER, checkpoint="none", output=output, shard_size=1)
    plan = Plan(output)
    with Lease(output, silent, "scoring run", "--output") as lease:
        start_s, start_cpu_s = time.monotonic(), time.process_time()
        with PlanUpdate(plan, config, lease, silent) as update:
            update.run()
        wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
    print(json.dumps({"shards": len(plan.sizes), "wall_s": wall_s, "cpu_s": cpu_s, "max_bytes": read_max_bytes()}))


if __name__ == "__main__":
    _plan(sys.argv[1], int(sys.argv[2]))
