"""Run a command and record when its batches were done."""

import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.speed.batch_report import REPORT_FILE, read_report

PROGRESS = re.compile(r"(?:score|train) ([\d,]+)/")


class FailedError(Exception):
    """A contestant ended with another status than 0."""


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        start_s: from the start of the command to the end of its first batch; nan without batches.
        rate: images per second from the first batch to the last; nan with fewer than two batches.
        wall_s: of the whole command.
    """

    start_s: float
    rate: float
    wall_s: float


def time_command(command: Sequence[str], folder: Path) -> Timing:
    """Run a command; its batches are read from its lines of progress, or from the file of `report_batch`.

    Raises:
        FailedError: the command failed; with its last lines.
    """
    report = folder / "batches.txt"
    report.unlink(missing_ok=True)
    start = time.time()
    lines: list[str] = []
    batches: list[tuple[float, float]] = []  # the time, and the number of images so far
    environment = os.environ | {REPORT_FILE: str(report)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := PROGRESS.match(line):
                batches.append((time.time(), float(found[1].replace(",", ""))))
    end = time.time()
    if process.returncode:
        raise FailedError(f"{command!r} ended with {process.returncode}: {''.join(lines[-20:])}")
    return compute_timing(start, end, read_report(report) if report.exists() else batches)


def compute_timing(start: float, end: float, batches: Sequence[tuple[float, float]]) -> Timing:
    """Compute the timing of a command from its batches: when each ended, and the number of images by then."""
    if not batches:
        return Timing(math.nan, math.nan, end - start)
    (first_s, first), (last_s, last) = batches[0], batches[-1]
    rate = (last - first) / (last_s - first_s) if last > first else math.nan
    return Timing(first_s - start, rate, end - start)


def kill_tree(pid: int) -> None:
    """Kill a process and those that it started, also the daemons of its Ray."""
    try:
        process = psutil.Process(pid)
        tree = [*process.children(recursive=True), process]
    except psutil.Error:
        return
    for each in tree:
        try:
            each.kill()
        except psutil.Error:
            continue
