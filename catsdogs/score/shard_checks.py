"""Check a range of shards: their parts against their manifests and records. Runs in a thread or in a Ray task."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.decisions import REVIEW, count_decisions
from catsdogs.schema import OK, STATUSES
from catsdogs.score.listing import sort_key
from catsdogs.score.parts import NUM_BINS, DamagedOutputError, PartRecord, read_records, read_tables
from catsdogs.score.plan import Plan, part_name

SHARDS_PER_READ = 4  # shards whose files are read at once
MAX_EXAMPLES = 50  # failed rows that the report shows
MODEL_KEY = "catsdogs.model_sha256"  # in the metadata of parts
COLUMNS = ["path", "status", "label", "prob", "error"]


@dataclass(frozen=True)
class ShardRange:
    """Successive shards of one listing; all that their check needs, so that it can be sent to another process.

    Attributes:
        sizes: number of files of each shard.
        columns: that each part must have.
        model_sha256: of the run's model; None if the run does not say it.
    """

    output: str
    first: int
    sizes: tuple[int, ...]
    columns: tuple[str, ...]
    model_sha256: object


@dataclass
class Totals:
    """Counts of the rows of parts; `stale` has the correct records of parts whose own is missing or differs.

    `by_decision` is None if no part has decisions.
    """

    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_label: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    stale: list[PartRecord] = field(default_factory=list)
    by_decision: Counter[str] | None = None

    def add(self, other: "Totals") -> None:
        """Add the totals of the parts that follow."""
        self.rows += other.rows
        self.by_status.update(other.by_status)
        self.by_label.update(other.by_label)
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.examples += other.examples[: MAX_EXAMPLES - len(self.examples)]
        self.stale += other.stale
        if other.by_decision is not None:
            self.by_decision = (self.by_decision or Counter()) + other.by_decision

    def summarize(self, plan: Plan, class_names: list[str]) -> dict[str, Any]:
        """Build the entries of `_summary.json` that the files determine."""
        return {
            "listed": plan.num_files,
            "rows": self.rows,
            "by_status": dict(sorted(self.by_status.items())),
            "by_label": {name: self.by_label.get(name, 0) for name in class_names},
            "unlisted": plan.unlisted,
        } | ({} if self.by_decision is None else count_decisions(self.by_decision))


@dataclass
class CheckedRange:
    """What the check of a range found.

    Attributes:
        first_keys: of each shard's files, in the order of `sort_key`.
        last_key: of its files.
        error: the first difference; what follows is not checked.
    """

    totals: Totals = field(default_factory=Totals)
    first_keys: list[bytes] = field(default_factory=list)
    last_key: bytes = b""
    error: DamagedOutputError | None = None


def check_range(shards: ShardRange) -> CheckedRange:
    """Compare the parts of a range with their manifests, their records and the settings of the run."""
    checked = CheckedRange()
    try:
        for start in range(0, len(shards.sizes), SHARDS_PER_READ):
            _check_group(shards, range(start, min(start + SHARDS_PER_READ, len(shards.sizes))), checked)
    except DamagedOutputError as error:
        checked.error = error
    return checked


def ascending_error(manifest_uri: str) -> DamagedOutputError:
    """Build the error for a manifest whose paths do not ascend, or do not follow those of the shard before."""
    return DamagedOutputError(f"{manifest_uri}: expected ascending paths, each once")


def _check_group(shards: ShardRange, positions: range, checked: CheckedRange) -> None:
    """Check the shards at some positions of a range; their files are read at once."""
    plan = Plan(shards.output)
    numbers = [shards.first + position for position in positions]
    columns = [*COLUMNS, "decision"] if "decision" in shards.columns else COLUMNS
    parts = read_tables([plan.part_uri(shard) for shard in numbers], columns, shards.columns)
    manifests = read_tables([plan.manifest_uri(shard) for shard in numbers], ["path"], ["path"])
    records = read_records(plan.output, numbers)
    for shard, part, manifest, record in zip(numbers, parts, manifests, records, strict=True):
        _check_part(plan.part_uri(shard), part, manifest, shards.sizes[shard - shards.first])
        _check_model(plan.part_uri(shard), part, shards.model_sha256)
        _check_order(plan.manifest_uri(shard), manifest, checked)
        _count(PartRecord.from_table(part_name(shard), part), record, part, checked.totals)


def _check_part(uri: str, part: pa.Table, manifest: pa.Table, num_files: int) -> None:
    if manifest.num_rows != num_files or part.num_rows != manifest.num_rows:
        raise DamagedOutputError(f"{uri}: expected {num_files} rows, found {part.num_rows}; remove it")
    if not part["path"].equals(manifest["path"]) and part["path"].to_pylist() != sorted(manifest["path"].to_pylist()):
        raise DamagedOutputError(f"{uri}: its rows are not the files of its plan; remove it")
    if unknown := set(part["status"].unique().to_pylist()) - set(STATUSES):
        raise DamagedOutputError(f"{uri}: unknown status {sorted(map(str, unknown))[0]}; remove it")
    has_label = np.asarray(pc.is_valid(part["label"]))
    if not np.array_equal(has_label, np.asarray(pc.equal(part["status"], OK))):
        raise DamagedOutputError(f"{uri}: expected a label where the status is ok, and nowhere else; remove it")
    if "decision" in part.column_names:
        label, decision = part["label"].fill_null(""), part["decision"].fill_null("")
        is_review = pc.and_(has_label, pc.equal(decision, REVIEW))
        if not pc.all(pc.or_(pc.equal(decision, label), is_review)).as_py():
            raise DamagedOutputError(f"{uri}: expected decisions that are the label or {REVIEW}; remove it")


def _check_model(uri: str, part: pa.Table, expected: object) -> None:
    """Check of which model a part has the rows. Either side may not say it: another program may rewrite a part."""
    found = (part.schema.metadata or {}).get(MODEL_KEY.encode(), b"").decode(errors="replace")
    if found and expected is not None and found != expected:
        raise DamagedOutputError(f"{uri}: expected rows of the model {expected!s:.16}, found {found[:16]!r}; remove it")


def _check_order(uri: str, manifest: pa.Table, checked: CheckedRange) -> None:
    """Check that the paths of a manifest ascend, and follow those of the shards before it in the range."""
    keys = read_sort_keys(manifest["path"])
    is_ascending = np.asarray(pc.less(keys[:-1], keys[1:])).all() if len(keys) > 1 else True
    if not is_ascending or keys[0].as_py() <= checked.last_key:
        raise ascending_error(uri)
    checked.first_keys.append(keys[0].as_py())
    checked.last_key = keys[-1].as_py()


def read_sort_keys(paths: pa.ChunkedArray) -> pa.Array:
    """Return `sort_key` of each path."""
    if pc.any(pc.starts_with(paths, "file://")).as_py():
        return pa.array([sort_key(path) for path in paths.to_pylist()], pa.binary())
    return paths.combine_chunks().cast(pa.binary())


def _count(counted: PartRecord, record: PartRecord | None, part: pa.Table, totals: Totals) -> None:
    stale = [] if counted == record else [counted]
    examples = [] if set(counted.by_status) <= {OK} else list(_iter_examples(part))
    by_status, by_label = Counter(counted.by_status), Counter(counted.by_label)
    by_decision = None if counted.by_decision is None else Counter(counted.by_decision)
    totals.add(Totals(counted.rows, by_status, by_label, counted.histogram, examples, stale, by_decision))


def _iter_examples(part: pa.Table) -> Iterator[tuple[str, str, str]]:
    failed = part.filter(pc.not_equal(part["status"], OK)).slice(0, MAX_EXAMPLES)
    return ((row["path"], row["status"], row["error"] or "") for row in failed.to_pylist())
