"""The memory of the driver of `catsdogs audit` at 10 times the files, on images that are drawn."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.scale.planning import read_max_bytes
from catsdogs.auditing import audit
from catsdogs.config import AuditConfig
from catsdogs.start import stop_ray

NUM_FILES, GROWTH = 10_000, 10
MAX_EXTRA_BYTES = 1000  # of memory for each file
SIZE = (64, 48)
STATUS = Path("/proc/self/status")


def check_audited_set(work: Path) -> Iterator[tuple[str, bool]]:
    """Compare the memory of two audits, each in a separate process."""
    few, many = (_measure(work, count) for count in (NUM_FILES, GROWTH * NUM_FILES))
    extra = (many["anonymous_bytes"] - few["anonymous_bytes"]) / ((GROWTH - 1) * NUM_FILES)
    peaks = " / ".join(f"{found['max_bytes'] / 2**20:.0f} MiB" for found in (many, few))
    anonymous = " / ".join(f"{found['anonymous_bytes'] / 2**20:.0f} MiB" for found in (many, few))
    yield (
        f"Memory of the driver of `audit` at {GROWTH * NUM_FILES:,} / {NUM_FILES:,} files: {peaks}, of which without "
        f"files and shared memory {anonymous}: {extra:.0f} bytes a file (goal: at most {MAX_EXTRA_BYTES}); "
        f"{many['images_per_s']:.0f} images/s.",
        extra <= MAX_EXTRA_BYTES,
    )


def _measure(work: Path, num_files: int) -> dict[str, Any]:
    folder = work / "images"
    _draw(folder, num_files)
    command = [sys.executable, "-m", "benchmarks.scale.audited_set", str(folder), str(work / "out")]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    shutil.rmtree(folder)
    return found


def _draw(folder: Path, num_files: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(num_files):
        path = folder / f"{i // 1000:04}" / f"{i:09}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)).resize(SIZE).save(path)


def _read_anonymous_bytes() -> int:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def _audit(folder: str, output: str) -> None:
    found, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            found.append(max(found.pop(), _read_anonymous_bytes()))

    thread = threading.Thread(target=watch)
    thread.start()
    start_s = time.monotonic()
    summary = audit(AuditConfig(input=folder, output=output))
    seconds = time.monotonic() - start_s
    ended.set()
    thread.join()
    stop_ray()
    record = {"anonymous_bytes": found[0], "max_bytes": read_max_bytes(), "seconds": seconds}
    print(json.dumps(record | {"images_per_s": summary["images_per_s"]}))


if __name__ == "__main__":
    _audit(*sys.argv[1:])
