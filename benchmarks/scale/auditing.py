"""Rows checked a second by the audit: by threads of the driver, and by Ray tasks."""

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scale.generated import RUN_SETTINGS, build_rows, iter_entries
from catsdogs import data, storage
from catsdogs.progress import silent
from catsdogs.schema import PREDICTIONS, parquet_bytes
from catsdogs.score.audit import MIN_SHARDS_FOR_TASKS, ConcurrentMap, audit
from catsdogs.score.parts import PartRecord
from catsdogs.score.plan import Plan, build_files_table, part_name
from catsdogs.start import start_ray, stop_ray

NUM_SHARDS, SHARD_SIZE = MIN_SHARDS_FOR_TASKS, 10_000


def check_audit(work: Path) -> Iterator[tuple[str, bool]]:
    """Audit the same output in both ways; there is no goal."""
    plan = _write_output(str(work / "audit"))
    in_threads_s = _measure(plan, None)
    start_ray()
    try:
        _measure(plan, data.map_in_tasks)  # starts Ray's processes
        in_tasks_s = _measure(plan, data.map_in_tasks)
    finally:
        stop_ray()
    yield (
        f"Audit of {plan.num_files:,} rows: {plan.num_files / in_threads_s:,.0f} rows/s by threads of the driver, "
        f"{plan.num_files / in_tasks_s:,.0f} rows/s by Ray tasks.",
        True,
    )


def _measure(plan: Plan, map_in_tasks: ConcurrentMap | None) -> float:
    start_s = time.monotonic()
    totals = audit(plan, RUN_SETTINGS.settings, silent, map_in_tasks)
    assert (totals.rows, totals.stale) == (plan.num_files, [])
    return time.monotonic() - start_s


def _write_output(output: str) -> Plan:
    plan = Plan(output, [SHARD_SIZE] * NUM_SHARDS, [0], listing_cursor=None)
    plan.save()
    for shard in range(NUM_SHARDS):
        first, end = shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE
        manifest = build_files_table(iter_entries(first, end), shard)
        part = build_rows(first, end, shard).select(PREDICTIONS.names)
        storage.write_bytes(plan.manifest_uri(shard), parquet_bytes(manifest))
        storage.write_bytes(plan.part_uri(shard), parquet_bytes(part))
        PartRecord.from_table(part_name(shard), part).write(output)
    return plan
