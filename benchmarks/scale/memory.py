"""The memory of the driver from the listing to the audit, at 8 times the files."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scale.generated import FOLDER, RUN_SETTINGS, GeneratedListing, NullClassifier
from benchmarks.scale.planning import read_max_bytes
from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.progress import silent
from catsdogs.score.pipeline import run_pipeline

SHARD_SIZE = 2_000
NUM_FILES = 500_000
GROWTH, MAX_RATIO = 8, 1.1


def check_memory(work: Path) -> Iterator[tuple[str, bool]]:
    """Compare the maximum memory of two runs, each in a separate process."""
    few, many = (_measure(work, count) for count in (NUM_FILES, GROWTH * NUM_FILES))
    ratio = many / few
    yield (
        f"Memory of the driver at {GROWTH * NUM_FILES:,} files in {GROWTH * NUM_FILES // SHARD_SIZE:,} shards / at "
        f"{NUM_FILES:,}: {many / 2**20:.0f} MiB / {few / 2**20:.0f} MiB = {ratio:.2f} (goal: at most {MAX_RATIO}).",
        ratio <= MAX_RATIO,
    )


def _measure(work: Path, num_files: int) -> int:
    output = work / "memory"
    command = [sys.executable, "-m", "benchmarks.scale.memory", str(output), str(num_files)]
    found = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    shutil.rmtree(output)
    return found


def _score(output: str, num_files: int) -> None:
    storage.Listing = GeneratedListing  # type: ignore[misc]
    GeneratedListing.num_generated = num_files
    config = ScoreConfig(input=FOLDER, checkpoint="none", output=output, shard_size=SHARD_SIZE)
    run_pipeline(config, RUN_SETTINGS, NullClassifier(num_files, SHARD_SIZE), silent)
    print(read_max_bytes())


if __name__ == "__main__":
    _score(sys.argv[1], int(sys.argv[2]))
