"""Stage 5, audit: check from the files alone that every listed file has exactly one row.

1. The paths of each part are those of its manifest.
2. Within a listing, paths ascend from shard to shard, so they are distinct.
3. No path is in two listings: a merge of the sorted listings would show it twice in a row.

Needs the memory of a few shards.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.config import VerifyConfig
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Progress, StageProgress, silent
from catsdogs.schema import OK, PREDICTIONS, STATUSES, WITH_EMBEDDINGS
from catsdogs.score.listing import iter_planned_files, sort_key
from catsdogs.score.parts import NUM_BINS, DamagedOutputError, PartRecord, read_records, read_tables
from catsdogs.score.plan import MANIFEST, RUN, SUCCESS, SUMMARY, Plan, parse_record, part_name

SHARDS_PER_READ = 8  # shards whose files are read at once
MAX_EXAMPLES = 50  # failed rows that the report shows
MODEL_KEY = "catsdogs.model_sha256"  # in the metadata of parts
COLUMNS = ["path", "status", "label", "prob", "error"]


@dataclass
class Totals:
    """Counts of the rows of all parts; `stale` has the correct records of parts whose own is missing or differs."""

    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_label: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    stale: list[PartRecord] = field(default_factory=list)

    def add(self, record: PartRecord, table: pa.Table) -> None:
        """Add one part."""
        self.rows += record.rows
        self.by_status.update(record.by_status)
        self.by_label.update(record.by_label)
        self.histogram = [a + b for a, b in zip(self.histogram, record.histogram, strict=True)]
        if len(self.examples) < MAX_EXAMPLES and set(record.by_status) != {OK}:
            failed = table.filter(pc.not_equal(table["status"], OK)).slice(0, MAX_EXAMPLES - len(self.examples))
            self.examples += [(row["path"], row["status"], row["error"] or "") for row in failed.to_pylist()]

    def summarize(self, plan: Plan, class_names: list[str]) -> dict[str, Any]:
        """Build the entries of `_summary.json` that the files determine."""
        return {
            "listed": plan.num_files,
            "rows": self.rows,
            "by_status": dict(sorted(self.by_status.items())),
            "by_label": {name: self.by_label.get(name, 0) for name in class_names},
            "unlisted": plan.unlisted,
        }


def verify(config: VerifyConfig, progress: Progress = silent) -> dict[str, Any]:
    """Audit a finished output, its records and its summary; return the counts of its rows.

    Raises:
        InputError: there is no output of a scoring run.
        RunError: the first difference that was found.
    """
    output = storage.absolute(config.output)
    uri = storage.join(output, RUN)
    found = storage.read_versioned(uri)
    if found is None:
        raise InputError(f"--output {output}: expected the output of a scoring run, found no {RUN}")
    settings = parse_record(uri, found[0])
    class_names = settings.get("class_names")
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"{uri}: expected a record of catsdogs with class_names, found {class_names!r:.80}")
    try:
        return _verify(output, settings, progress)
    except DamagedOutputError as error:
        repair = f"remove {SUCCESS} there, if it exists, and run the same score command again"
        raise RunError(f"{error}; {repair}") from error


def _verify(output: str, settings: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    plan = Plan.load(output)
    totals = audit(plan, settings, progress)
    if totals.stale:
        raise DamagedOutputError(f"{output}: the record of {totals.stale[0].part} is missing or wrong")
    if storage.read_versioned(storage.join(output, SUCCESS)) is None:
        raise RunError(f"{output}: all rows are there, but no {SUCCESS}; run the same score command again")
    uri = storage.join(output, SUMMARY)
    try:
        summary = parse_record(uri, storage.read_bytes(uri))
    except InputError as error:
        raise DamagedOutputError(str(error)) from error
    counts = totals.summarize(plan, settings["class_names"])
    for name, value in counts.items():
        if summary.get(name) != value:
            raise DamagedOutputError(f"{uri}: expected {name} {value}, found {summary.get(name)}")
    return counts


def audit(plan: Plan, settings: Mapping[str, Any], progress: Progress) -> Totals:
    """Compare all parts with their manifests and the settings of the run, which `_run.json` has.

    Raises:
        DamagedOutputError: the first difference.
    """
    _check_names(plan)
    totals = Totals()
    last_keys: dict[int, bytes] = {}
    for start in range(0, len(plan.sizes), SHARDS_PER_READ):
        shards = range(start, min(start + SHARDS_PER_READ, len(plan.sizes)))
        records = read_records(plan.output, shards)
        for shard, part, record in zip(
            shards, _iter_checked_parts(plan, shards, settings, last_keys), records, strict=True
        ):
            counted = PartRecord.from_table(part_name(shard), part)
            if counted != record:
                totals.stale.append(counted)
            totals.add(counted, part)
            progress(StageProgress("check", totals.rows, plan.num_files))
    if len(plan.listing_first_shards) > 1:
        _check_listings(plan)
    return totals


def _check_names(plan: Plan) -> None:
    if plan.listing_cursor is not None:
        raise DamagedOutputError(f"{plan.output}: its listing is not finished")
    if shards := plan.rescore_shards():
        raise DamagedOutputError(f"{plan.output}: rows of {len(shards)} parts are to be scored again")
    found = {name for name in storage.list_names(plan.output) if name.startswith("part-")}
    expected = {part_name(shard) for shard in range(len(plan.sizes))}
    if missing := sorted(expected - found):
        raise DamagedOutputError(
            f"{plan.output}: {len(missing)} of {len(expected)} parts are missing, {missing[0]} first"
        )
    if foreign := sorted(found - expected):
        raise DamagedOutputError(f"{plan.output}/{foreign[0]}: no part of this scoring run; move it away")


def _iter_checked_parts(
    plan: Plan, shards: range, settings: Mapping[str, Any], last_keys: dict[int, bytes]
) -> Iterator[pa.Table]:
    """Check shards and yield their parts; `last_keys` has the last key of each listing, by its first shard."""
    schema = WITH_EMBEDDINGS if settings.get("save_embeddings") else PREDICTIONS
    parts = read_tables([plan.part_uri(shard) for shard in shards], COLUMNS, schema.names)
    manifests = read_tables([plan.manifest_uri(shard) for shard in shards], ["path"], ["path"])
    for shard, part, manifest in zip(shards, parts, manifests, strict=True):
        _check_shard(plan, shard, part, manifest)
        _check_model(plan.part_uri(shard), part, settings.get("model_sha256"))
        keys = _sort_keys(manifest["path"])
        listing = max(first for first in plan.listing_first_shards if first <= shard)
        is_ascending = np.asarray(pc.less(keys[:-1], keys[1:])).all() if len(keys) > 1 else True
        if not is_ascending or keys[0].as_py() <= last_keys.get(listing, b""):
            raise DamagedOutputError(f"{plan.manifest_uri(shard)}: expected ascending paths, each once")
        last_keys[listing] = keys[-1].as_py()
        yield part


def _check_shard(plan: Plan, shard: int, part: pa.Table, manifest: pa.Table) -> None:
    uri = plan.part_uri(shard)
    if manifest.num_rows != plan.sizes[shard] or part.num_rows != manifest.num_rows:
        raise DamagedOutputError(f"{uri}: expected {plan.sizes[shard]} rows, found {part.num_rows}; remove it")
    if not part["path"].equals(manifest["path"]) and part["path"].to_pylist() != sorted(manifest["path"].to_pylist()):
        raise DamagedOutputError(f"{uri}: its rows are not the files of its plan; remove it")
    if unknown := set(part["status"].unique().to_pylist()) - set(STATUSES):
        raise DamagedOutputError(f"{uri}: unknown status {sorted(map(str, unknown))[0]}; remove it")
    has_label = np.asarray(pc.is_valid(part["label"]))
    if not np.array_equal(has_label, np.asarray(pc.equal(part["status"], OK))):
        raise DamagedOutputError(f"{uri}: expected a label where the status is ok, and nowhere else; remove it")


def _check_model(uri: str, part: pa.Table, expected: object) -> None:
    """Check of which model a part has the rows. Either side may not say it: another program may rewrite a part."""
    found = (part.schema.metadata or {}).get(MODEL_KEY.encode(), b"").decode(errors="replace")
    if found and expected is not None and found != expected:
        raise DamagedOutputError(f"{uri}: expected rows of the model {expected!s:.16}, found {found[:16]!r}; remove it")


def _sort_keys(paths: pa.ChunkedArray) -> pa.Array:
    if pc.any(pc.starts_with(paths, "file://")).as_py():
        return pa.array([sort_key(path) for path in paths.to_pylist()], pa.binary())
    return paths.combine_chunks().cast(pa.binary())


def _check_listings(plan: Plan) -> None:
    """Check that no path is in two listings."""
    for previous, current in pairwise(iter_planned_files(plan, len(plan.sizes))):
        if previous.key == current.key:
            raise DamagedOutputError(f"{plan.output}/{MANIFEST}: {current.path!r} is listed twice")
