"""100 million files of which 1% is open: what it takes to plan the resume; and what the proof takes a row."""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.progress import silent
from catsdogs.schema import PREDICTIONS, parquet_bytes
from catsdogs.score.audit import audit
from catsdogs.score.parts import PartRecord
from catsdogs.score.plan import MANIFEST, RUN, STATS, Plan, build_files_table, part_name
from catsdogs.score.run import RunSettings, run

NUM_SHARDS, SHARD_SIZE, OPEN_EVERY = 10_000, 10_000, 100
PROVED_SHARDS = 50
RUN_SETTINGS = RunSettings({"class_names": ["a", "b"], "model_sha256": "0" * 64}, {})


class _PlannedError(BaseException):
    """The first file is about to be labelled."""


class _Stopper:
    """A labeller that stops, and remembers how much was to be done."""

    parallelism = dict.fromkeys(("read", "decode", "model"), 1)
    num_open = 0

    def __call__(self, uris: Sequence[str]) -> Iterator[pa.Table]:
        self.num_open = len(uris)
        raise _PlannedError


def measure_planning(work: Path) -> None:
    """Generate the manifest and measure, in a process of its own, if that was not done."""
    if read_planning(work):
        return
    output = work / "planning"
    shutil.rmtree(output, ignore_errors=True)
    began = time.monotonic()
    _generate(output)
    print(f"{NUM_SHARDS * SHARD_SIZE:,} rows of manifest in {time.monotonic() - began:.0f} s", flush=True)
    words = [sys.executable, "-m", "benchmarks.faults.planning", output]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    shutil.rmtree(output)
    found |= _prove(work / "proving")
    print(found, flush=True)
    _path(work).write_text(json.dumps(found))


def read_planning(work: Path) -> dict[str, float]:
    """Read what was measured; empty where nothing was."""
    return json.loads(_path(work).read_text()) if _path(work).exists() else {}


def _path(work: Path) -> Path:
    return work / "planning.json"


def _generate(output: Path) -> None:
    """Write the plan, and a part for every shard but each hundredth; the parts are one file of many names."""
    plan = Plan(str(output), [SHARD_SIZE] * NUM_SHARDS, [0], listing_cursor=None)
    plan.save()
    storage.write_bytes(f"{output}/{RUN}", json.dumps(dict(RUN_SETTINGS.settings)).encode())
    part = output / "_manifest" / "_some-part"
    part.write_bytes(b"its rows are not read")
    for shard in range(NUM_SHARDS):
        (output / MANIFEST / part_name(shard)).write_bytes(parquet_bytes(build_files_table(_entries(shard), shard)))
        if shard % OPEN_EVERY:
            os.link(part, output / part_name(shard))


def _entries(shard: int) -> Iterator[storage.Entry]:
    for i in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
        yield storage.Entry(f"s3://photos/2026/{i // 1000:06d}/{i:09d}.jpg", 40_000 + i % 9999, f"{i:032x}")


def _plan_resume(output: str) -> None:
    """Measure from the settings to the first file to be labelled."""
    stopper, began = _Stopper(), time.monotonic()
    config = ScoreConfig(input="s3://photos/2026", checkpoint="none", output=output, shard_size=SHARD_SIZE)
    try:
        run(config, RUN_SETTINGS, stopper, silent)
    except _PlannedError:
        seconds = time.monotonic() - began
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"plan_s": seconds, "plan_rss_bytes": rss_bytes, "open_shards": stopper.num_open}
    print(json.dumps(found))


def _prove(output: Path) -> dict[str, float]:
    """Measure the proof on some shards."""
    shutil.rmtree(output, ignore_errors=True)
    plan = Plan(str(output), [SHARD_SIZE] * PROVED_SHARDS, [0], listing_cursor=None)
    plan.save()
    (output / STATS).mkdir()
    for shard in range(PROVED_SHARDS):
        files = build_files_table(_entries(shard), shard)
        storage.write_bytes(plan.manifest_uri(shard), parquet_bytes(files))
        part = _rows(files["path"].to_pylist())
        storage.write_bytes(plan.part_uri(shard), parquet_bytes(part))
        PartRecord.from_table(part_name(shard), part).write(str(output))
    began = time.monotonic()
    totals = audit(plan, silent, lambda record: None)
    seconds = time.monotonic() - began
    shutil.rmtree(output)
    return {"proof_rows_per_s": totals.rows / seconds}


def _rows(paths: list[str]) -> pa.Table:
    rows = []
    for path, prob in zip(paths, itertools.cycle([0.51, 0.7, 0.83, 0.999])):
        row = {"path": path, "status": "ok", "label": "a", "index": 0, "prob": prob, "probs": [prob, 1 - prob]}
        rows.append(row | {"width": 404, "height": 360, "size_bytes": 45_000, "true_label": "a"})
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


if __name__ == "__main__":
    _plan_resume(sys.argv[1])
