"""The resume of 100 million files of which 1% is unfinished, and the audit: seconds and memory."""

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
from catsdogs.score.pipeline import run_pipeline
from catsdogs.score.plan import MANIFEST, RUN, STATS, PendingShard, Plan, build_files_table, part_name
from catsdogs.score.run_files import RunSettings

NUM_SHARDS, SHARD_SIZE, OPEN_EVERY = 10_000, 10_000, 100
NUM_AUDITED_SHARDS = 50
RUN_SETTINGS = RunSettings({"class_names": ["a", "b"], "model_sha256": "0" * 64}, {})


class _PlannedError(BaseException):
    """Ends a run where it would score its first file."""


class _StoppingScorer:
    """A scorer that stops at once, and counts the shards it was given."""

    num_open = 0

    def __call__(self, shards: Sequence[PendingShard]) -> Iterator[pa.Table]:
        self.num_open = len(shards)
        raise _PlannedError


def measure_planning(work: Path) -> None:
    """Generate the manifest, then measure in a process of its own; skipped where there is a result."""
    if read_planning(work):
        return
    output = work / "planning"
    shutil.rmtree(output, ignore_errors=True)
    start = time.monotonic()
    _generate(output)
    print(f"{NUM_SHARDS * SHARD_SIZE:,} rows of manifest in {time.monotonic() - start:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks.faults.planning", str(output)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shutil.rmtree(output)
    found |= _measure_audit(work / "audit")
    print(found, flush=True)
    _result_path(work).write_text(json.dumps(found))


def read_planning(work: Path) -> dict[str, float]:
    """Read the result of an earlier call; empty without one."""
    return json.loads(_result_path(work).read_text()) if _result_path(work).exists() else {}


def _result_path(work: Path) -> Path:
    return work / "planning.json"


def _generate(output: Path) -> None:
    """Write the plan, and a part for all shards but each hundredth; the parts are links to one file."""
    plan = Plan(str(output), [SHARD_SIZE] * NUM_SHARDS, [0], listing_cursor=None)
    plan.save()
    storage.write_bytes(f"{output}/{RUN}", json.dumps(dict(RUN_SETTINGS.settings)).encode())
    part = output / "_manifest" / "_some-part"
    part.write_bytes(b"never read")
    for shard in range(NUM_SHARDS):
        (output / MANIFEST / part_name(shard)).write_bytes(
            parquet_bytes(build_files_table(_list_entries(shard), shard))
        )
        if shard % OPEN_EVERY:
            os.link(part, output / part_name(shard))


def _list_entries(shard: int) -> Iterator[storage.Entry]:
    for i in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
        yield storage.Entry(f"s3://photos/2026/{i // 1000:06d}/{i:09d}.jpg", 40_000 + i % 9999, f"{i:032x}")


def _measure_resume(output: str) -> None:
    """Measure a run from its settings to its first file."""
    scorer, start = _StoppingScorer(), time.monotonic()
    config = ScoreConfig(input="s3://photos/2026", checkpoint="none", output=output, shard_size=SHARD_SIZE)
    try:
        run_pipeline(config, RUN_SETTINGS, scorer, silent)
    except _PlannedError:
        seconds = time.monotonic() - start
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"plan_s": seconds, "plan_rss_bytes": rss_bytes, "open_shards": scorer.num_open}
    print(json.dumps(found))


def _measure_audit(output: Path) -> dict[str, float]:
    """Measure the audit on some shards."""
    shutil.rmtree(output, ignore_errors=True)
    plan = Plan(str(output), [SHARD_SIZE] * NUM_AUDITED_SHARDS, [0], listing_cursor=None)
    plan.save()
    (output / STATS).mkdir()
    for shard in range(NUM_AUDITED_SHARDS):
        files = build_files_table(_list_entries(shard), shard)
        storage.write_bytes(plan.manifest_uri(shard), parquet_bytes(files))
        part = _build_part(files["path"].to_pylist())
        storage.write_bytes(plan.part_uri(shard), parquet_bytes(part))
        PartRecord.from_table(part_name(shard), part).write(str(output))
    start = time.monotonic()
    totals = audit(plan, RUN_SETTINGS.settings, silent)
    seconds = time.monotonic() - start
    shutil.rmtree(output)
    return {"audit_rows_per_s": totals.rows / seconds}


def _build_part(paths: list[str]) -> pa.Table:
    rows = []
    for path, prob in zip(paths, itertools.cycle([0.51, 0.7, 0.83, 0.999])):
        row = {"path": path, "status": "ok", "label": "a", "index": 0, "prob": prob, "probs": [prob, 1 - prob]}
        rows.append(row | {"width": 404, "height": 360, "size_bytes": 45_000, "true_label": "a"})
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


if __name__ == "__main__":
    _measure_resume(sys.argv[1])
