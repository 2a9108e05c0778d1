"""A command, watched: when its batches were done."""

import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.peers.common import LOG

PROGRESS = re.compile(r"(?:score|train) ([\d,]+)/")


class FailedError(Exception):
    """A contestant ended badly."""


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        start_s: from the command to its first batch done; nan where none was seen.
        rate: images a second from the first batch to the last; nan where fewer than two were seen, or they began again.
        wall_s: the whole command.
    """

    start_s: float
    rate: float
    wall_s: float


def timed(words: Sequence[str], folder: Path) -> Timing:
    """Run a contestant; commands of ours tell their batches in lines of progress, others in a file.

    Raises:
        FailedError: it ended badly; with its last lines.
    """
    log = folder / "batches.txt"
    log.unlink(missing_ok=True)
    began = time.time()
    lines: list[str] = []
    batches: list[tuple[float, float]] = []  # when, and how many by then
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {LOG: str(log)}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := PROGRESS.match(line):
                batches.append((time.time(), float(found[1].replace(",", ""))))
    ended = time.time()
    if process.returncode:
        raise FailedError(f"{words!r} ended with {process.returncode}: {''.join(lines[-20:])}")
    if log.exists():
        batches = _summed(log)
    if not batches:
        return Timing(math.nan, math.nan, ended - began)
    (first_s, first), (last_s, last) = batches[0], batches[-1]
    rate = (last - first) / (last_s - first_s) if last > first else math.nan
    return Timing(first_s - began, rate, ended - began)


def _summed(log: Path) -> list[tuple[float, float]]:
    done = 0.0
    batches = []
    for line in log.read_text().splitlines():
        when, count = line.split()
        done += float(count)
        batches.append((float(when), done))
    return batches
