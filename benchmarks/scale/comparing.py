"""The memory of `compare` with two tables of which every row has another label."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.scale.planning import read_max_bytes
from catsdogs.comparison import compare
from catsdogs.config import CompareConfig
from catsdogs.predictions import build_predictions
from catsdogs.schema import parquet_bytes

NUM_ROWS, PART_ROWS = 5_000_000, 10_000
MAX_GIB = 2.0
CLASS_NAMES = ["cats", "dogs"]
PATH = "s3://photographs-of-a-company/2026/camera-{:03}/month-{:02}/day-{:02}/IMG_{:012}.jpg"  # 82 characters


def check_comparison(work: Path) -> Iterator[tuple[str, bool]]:
    """Compare in a separate process; its maximum memory is limited."""
    for name in ("a", "b"):
        _write_scoring(work / name, flip=name == "b")
    start_s = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.scale.comparing", str(work)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    seconds, gib = time.monotonic() - start_s, found["max_bytes"] / 2**30
    assert found["changed"] == 1
    yield (
        f"Memory of compare with two tables of {NUM_ROWS:,} rows, all of them changed: {gib:.2f} GiB "
        f"(goal: at most {MAX_GIB}), in {seconds:.0f} s.",
        gib <= MAX_GIB,
    )


def _write_scoring(folder: Path, flip: bool) -> None:
    folder.mkdir()
    metadata = {"catsdogs.class_names": json.dumps(CLASS_NAMES), "catsdogs.model_sha256": "0" * 64}
    for part, first in enumerate(range(0, NUM_ROWS, PART_ROWS)):
        table = _build_part(part, range(first, min(first + PART_ROWS, NUM_ROWS)), flip)
        content = parquet_bytes(table.sort_by("path").replace_schema_metadata(metadata))
        (folder / f"part-{part:05}.parquet").write_bytes(content)
    (folder / "_SUCCESS").touch()


def _build_part(part: int, numbers: range, flip: bool) -> pa.Table:
    rng = np.random.default_rng(part)
    prob_N = rng.uniform(0, 1, len(numbers)).astype(np.float32)
    probs_NK = np.column_stack([1 - prob_N, prob_N])
    rows = pa.table(
        {
            "path": [PATH.format(i % 97, i % 12, i % 28, i) for i in numbers],
            "size_bytes": rng.integers(10_000, 4_000_000, len(numbers)),
            "status": ["ok"] * len(numbers),
            "error": pa.nulls(len(numbers), pa.string()),
            "width": rng.integers(200, 4000, len(numbers), np.int32),
            "height": rng.integers(200, 4000, len(numbers), np.int32),
        }
    )
    return build_predictions(rows, probs_NK[:, ::-1] if flip else probs_NK, CLASS_NAMES)


def _compare(work: str) -> None:
    record = compare(CompareConfig(a=f"{work}/a", b=f"{work}/b", output=f"{work}/comparison"))
    print(json.dumps({"changed": round(record["figures"]["changed"], 4), "max_bytes": read_max_bytes()}))


if __name__ == "__main__":
    _compare(sys.argv[1])
