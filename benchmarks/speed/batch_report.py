"""The file in which a measured command reports when its batches are done."""

import os
import time
from pathlib import Path

REPORT_FILE = "CATSDOGS_BENCH_LOG"  # the environment variable with its path


def report_batch(num_images: float) -> None:
    """Report that a batch of `num_images` is done now."""
    with open(os.environ[REPORT_FILE], "a", encoding="ascii") as file:
        file.write(f"{time.time()} {num_images}\n")


def read_report(path: Path) -> list[tuple[float, float]]:
    """Read when each batch was done, and the number of images by then."""
    batches = []
    total = 0.0
    for line in path.read_text().splitlines():
        time_s, num_images = map(float, line.split())
        total += num_images
        batches.append((time_s, total))
    return batches
