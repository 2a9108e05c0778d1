"""The proof: every listed file has exactly one row, and no other row is there; from the files alone.

Within a shard the part's paths are its manifest's, ascending and so distinct; within one listing shards ascend, which
leaves only several listings to be merged. Memory is that of a few shards, whatever their number.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Progress, StageProgress
from catsdogs.schema import OK, STATUSES, read_table
from catsdogs.score.entries import sort_key
from catsdogs.score.parts import NUM_BINS, PartRecord, read_records, unreadable
from catsdogs.score.plan import MANIFEST, Plan, part_name, read_files

SHARDS_PER_READ = 8  # shards whose files are read together
MAX_EXAMPLES = 50  # failed rows that the report names
COLUMNS = ["path", "status", "label", "prob", "error"]


@dataclass
class Totals:
    """What all parts hold together."""

    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_label: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, record: PartRecord, table: pa.Table) -> None:
        """Add one part."""
        self.rows += record.rows
        self.by_status.update(record.by_status)
        self.by_label.update(record.by_label)
        self.histogram = [a + b for a, b in zip(self.histogram, record.histogram, strict=True)]
        if len(self.examples) < MAX_EXAMPLES and set(record.by_status) != {OK}:
            failed = table.filter(pc.not_equal(table["status"], OK)).slice(0, MAX_EXAMPLES - len(self.examples))
            self.examples += [(row["path"], row["status"], row["error"] or "") for row in failed.to_pylist()]


def audit(plan: Plan, progress: Progress, on_mismatch: Callable[[PartRecord], None]) -> Totals:
    """Read everything back and compare both ways.

    Args:
        on_stale: takes the right record of a part whose own is missing or says something else.

    Raises:
        RunError: names the first thing that is wrong.
    """
    _check_names(plan)
    totals = Totals()
    last: dict[int, bytes] = {}
    for start in range(0, len(plan.sizes), SHARDS_PER_READ):
        shards = range(start, min(start + SHARDS_PER_READ, len(plan.sizes)))
        records = read_records(plan.output, shards)
        for shard, table, record in zip(shards, _iter_checked_parts(plan, shards, last), records, strict=True):
            found = PartRecord.from_table(part_name(shard), table)
            if found != record:
                on_mismatch(found)
            totals.add(found, table)
            progress(StageProgress("check", totals.rows, plan.num_files))
    _check_listings(plan)
    return totals


def _check_names(plan: Plan) -> None:
    if plan.listing_cursor is not None:
        raise RunError(f"{plan.output}: its listing is not finished")
    incomplete = plan.rescore_shards()
    if incomplete:
        raise RunError(f"{plan.output}: rows of {len(incomplete)} parts wait to be labelled again")
    found = {name for name in storage.list_names(plan.output) if name.startswith("part-")}
    expected = {part_name(shard) for shard in range(len(plan.sizes))}
    if missing := sorted(expected - found):
        raise RunError(f"{plan.output}: {len(missing)} parts are missing, {missing[0]} first")
    if foreign := sorted(found - expected):
        raise RunError(f"{plan.output}/{foreign[0]}: no part of this scoring; move it away")


def _iter_checked_parts(plan: Plan, shards: range, last: dict[int, bytes]) -> Iterator[pa.Table]:
    uris = [uri for shard in shards for uri in (plan.part_uri(shard), plan.manifest_uri(shard))]
    fetched = storage.fetch([storage.Entry(uri) for uri in uris])
    tables = [_table(uri, file) for uri, file in zip(uris, fetched, strict=True)]
    for i, shard in enumerate(shards):
        part, manifest = tables[2 * i : 2 * i + 2]
        _check_shard(plan, shard, part, manifest)
        keys = _keys(manifest["path"])
        generation = max(first for first in plan.listing_first_shards if first <= shard)
        ascending = np.asarray(pc.less(keys[:-1], keys[1:])) if len(keys) > 1 else np.array([True])
        if not ascending.all() or keys[0].as_py() <= last.get(generation, b""):
            raise RunError(f"{plan.manifest_uri(shard)}: expected ascending paths, each once")
        last[generation] = keys[-1].as_py()
        yield part


def _table(uri: str, fetched: storage.Fetched) -> pa.Table:
    try:
        if fetched.image_bytes is None:
            raise InputError(f"it cannot be read: {fetched.error}")
        columns = ["path"] if f"/{MANIFEST}/" in uri else COLUMNS
        return read_table(fetched.image_bytes, columns)
    except (InputError, pa.ArrowException) as error:
        raise unreadable(uri, error) from error


def _check_shard(plan: Plan, shard: int, part: pa.Table, manifest: pa.Table) -> None:
    uri = plan.part_uri(shard)
    if manifest.num_rows != plan.sizes[shard] or part.num_rows != manifest.num_rows:
        raise RunError(f"{uri}: expected {plan.sizes[shard]} rows, found {part.num_rows}; {_REMOVE}")
    if not part["path"].equals(manifest["path"]) and part["path"].to_pylist() != sorted(manifest["path"].to_pylist()):
        raise RunError(f"{uri}: its rows are not the files of its plan; {_REMOVE}")
    if unknown := set(part["status"].unique().to_pylist()) - set(STATUSES):
        raise RunError(f"{uri}: unknown status {sorted(map(str, unknown))[0]}; {_REMOVE}")
    labelled = np.asarray(pc.is_valid(part["label"]))
    if not np.array_equal(labelled, np.asarray(pc.equal(part["status"], OK))):
        raise RunError(f"{uri}: expected a label where the status is ok, and nowhere else; {_REMOVE}")


_REMOVE = "remove it"


def _keys(paths: pa.ChunkedArray) -> pa.Array:
    quoted = pc.any(pc.starts_with(paths, "file://")).as_py()
    if quoted:
        return pa.array([sort_key(path) for path in paths.to_pylist()], pa.binary())
    return paths.combine_chunks().cast(pa.binary())


def _check_listings(plan: Plan) -> None:
    """Make sure that no path is in two listings."""
    if len(plan.listing_first_shards) < 2:
        return
    ends = pairwise([*plan.listing_first_shards, len(plan.sizes)])
    merged = heapq.merge(*(_paths(plan, first, end) for first, end in ends))
    for path, following in pairwise(merged):
        if path == following:
            raise RunError(f"{plan.output}/{MANIFEST}: {path!r} is listed twice")


def _paths(plan: Plan, first: int, end: int) -> Iterator[bytes]:
    for shard in range(first, end):
        yield from map(sort_key, read_files(plan.manifest_uri(shard))["path"].to_pylist())
