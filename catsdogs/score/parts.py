"""Rows -> parts, each committed whole, and the record of each part.

A part that exists is finished: creating the object is the commit. Its record in `_stats` follows. If the driver dies in
between, the next run writes the record after its audit.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.errors import RunError
from catsdogs.lease import LeaseClaim, LeaseWatch
from catsdogs.schema import build_schema, parquet_bytes, read_names, read_table
from catsdogs.score.plan import STATS, PendingShard, Plan, part_name, read_files, replace_rows
from catsdogs.score.threads import WritePool

logger = logging.getLogger(__name__)
NUM_BINS = 20
# Extra columns that the classifier copies unchanged: the shard, the version of the file as it was read, and the cost.
PASSTHROUGH_COLUMNS = ("shard", "version", "retries", "read_s", "decode_s")


class DamagedOutputError(RunError):
    """The files of an output differ from its plan."""


@dataclass(frozen=True)
class PartRecord:
    """Counts of one part's rows; `histogram` counts `prob` in NUM_BINS equal bins from 0 to 1.

    `by_decision` is None if the part has no decisions.
    """

    part: str
    rows: int
    by_status: dict[str, int]
    by_label: dict[str, int]
    histogram: list[int]
    by_decision: dict[str, int] | None = None

    @classmethod
    def from_table(cls, part: str, table: pa.Table) -> "PartRecord":
        """Count the rows of a part."""
        histogram = np.histogram(table["prob"].drop_null().to_numpy(), bins=NUM_BINS, range=(0, 1))[0]
        by_status, by_label = (count_values(table[name].drop_null()) for name in ("status", "label"))
        has_decisions = "decision" in table.column_names
        by_decision = count_values(table["decision"].drop_null()) if has_decisions else None
        return cls(part, table.num_rows, by_status, by_label, histogram.tolist(), by_decision)

    def write(self, output: str) -> None:
        """Write the record to `_stats`."""
        record = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        storage.write_bytes(_record_uri(output, self.part), json.dumps(record).encode())


def _record_uri(output: str, part: str) -> str:
    return storage.join(output, STATS, part.replace(".parquet", ".json"))


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Count how often each value of a column occurs."""
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def read_records(output: str, shards: Sequence[int]) -> list[PartRecord | None]:
    """Read the records of parts; None for one that is missing or damaged."""
    entries = [storage.Entry(_record_uri(output, part_name(shard))) for shard in shards]
    fetched = storage.fetch(entries)
    return [_parse_record(entry.path, file.content) for entry, file in zip(entries, fetched, strict=True)]


def _parse_record(uri: str, content: bytes | None) -> PartRecord | None:
    try:
        record = None if content is None else PartRecord(**json.loads(content))
        return record if record is None or isinstance(record.by_status, dict) else None
    except (ValueError, TypeError, RecursionError):  # RecursionError: nested too deeply
        logger.debug("the record %s is damaged", uri, exc_info=True)
        return None


def read_tables(uris: Sequence[str], columns: list[str], required: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Read finished parts or manifests concurrently, and yield columns of each in order.

    Args:
        required: columns that each file must have, also if they are not read.

    Raises:
        DamagedOutputError: a file cannot be read, or lacks a column.
    """
    for uri, file in zip(uris, storage.fetch([storage.Entry(uri) for uri in uris]), strict=True):
        if file.content is None:
            raise DamagedOutputError(f"{uri}: expected a finished part, but it cannot be read: {file.error}")
        table = _parse_table(uri, file.content, columns)
        if missing := [name for name in required if name not in read_names(file.content)]:
            raise DamagedOutputError(f"{uri}: expected the column {missing[0]}; remove it")
        yield table


def _parse_table(uri: str, content: bytes, columns: list[str] | None = None) -> pa.Table:
    try:
        return read_table(content, columns)
    except pa.ArrowException as error:
        raise DamagedOutputError(f"{uri}: expected a finished part, but {error}; remove it") from error


class PartWriter:
    """Stage 4, write: collect the rows of each shard, and commit its part concurrently once they are complete.

    Runs only in the driver, in a `with` block, after which no commit runs. RunError if another driver has the lease, or
    a part cannot be written; it is raised by the next call of any method.
    """

    def __init__(self, output: str, metadata: Mapping[str, str], lease: LeaseClaim) -> None:
        self.plan = Plan(output)  # as it was saved when `pending_shards` read it
        self._metadata = dict(metadata)
        self.lease = lease
        self._watch = LeaseWatch(lease)
        self._incomplete: dict[int, list[pa.Table]] = {}
        self._writes = WritePool()
        self.write_s = 0.0  # in which the driver waited for commits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writes.__exit__(*error)

    @property
    def num_committed(self) -> int:
        """Number of commits that have ended."""
        return self._writes.num_done

    def pending_shards(self, with_rescores: bool = True) -> dict[int, PendingShard]:
        """Wait for all commits, read the saved plan, and find its shards to score."""
        self._wait()
        self.lease.check()
        self.plan = Plan.load(self.plan.output)
        return self.plan.pending_shards(self.lease, with_rescores)

    def add(self, rows: pa.Table, pending: Mapping[int, PendingShard]) -> None:
        """Add rows of pending shards, in any order; start to commit the parts that are complete."""
        shards = rows["shard"].to_numpy()
        for shard in np.unique(shards).tolist():
            tables = self._incomplete.setdefault(shard, [])
            tables.append(rows.filter(pa.array(shards == shard)))
            if sum(table.num_rows for table in tables) >= pending[shard].num_rows:
                began = time.monotonic()
                complete = pa.concat_tables(self._incomplete.pop(shard))
                self._writes.submit(complete.nbytes, self._commit, pending[shard], complete)
                self.write_s += time.monotonic() - began

    def drop_incomplete(self) -> dict[int, list[pa.Table]]:
        """Wait for all commits; drop and return the rows of incomplete shards, which will be scored again."""
        self._wait()
        dropped, self._incomplete = self._incomplete, {}
        return dropped

    def write_records(self, records: Iterable[PartRecord]) -> None:
        """Write records of finished parts."""
        for record in records:
            self._writes.submit(0, self._write_record, record)
        self._wait()

    def _wait(self) -> None:
        began = time.monotonic()
        self._writes.wait()
        self.write_s += time.monotonic() - began

    def _write_record(self, record: PartRecord) -> None:
        self._watch.check()
        record.write(self.plan.output)

    def _commit(self, pending: PendingShard, rows: pa.Table) -> None:
        schema = build_schema("embedding" in rows.column_names, "decision" in rows.column_names)
        table = rows.select(schema.names).sort_by("path").cast(schema)
        planned = read_files(pending.uri).select(["path"]).sort_by("path")
        assert table["path"].equals(planned["path"]), f"rows of shard {pending.shard} are not those of its plan"
        if pending.is_rescore:
            self._replace(pending, table, rows)
        else:
            content = self._part_bytes(table)
            self._watch.check()
            if not storage.create_bytes(self.plan.part_uri(pending.shard), content):
                raise self._conflict(pending)
            PartRecord.from_table(part_name(pending.shard), table).write(self.plan.output)

    def _replace(self, pending: PendingShard, table: pa.Table, rows: pa.Table) -> None:
        """Replace rows of a finished part; then update its manifest, and remove the request to score them again."""
        uri = self.plan.part_uri(pending.shard)
        found = storage.read_versioned(uri)
        if found is None:
            raise self._conflict(pending)
        table = replace_rows(_parse_table(uri, found[0]), table)
        self.lease.check()
        if not storage.replace_bytes(uri, self._part_bytes(table), found[1]):
            raise self._conflict(pending)
        PartRecord.from_table(part_name(pending.shard), table).write(self.plan.output)
        # A file that could not be read keeps the version that was listed.
        self.plan.update_versions(pending.shard, rows.filter(pc.is_valid(rows["version"])), self.lease)
        storage.remove(pending.uri)

    def _part_bytes(self, table: pa.Table) -> bytes:
        return parquet_bytes(table.replace_schema_metadata(self._metadata))

    def _conflict(self, pending: PendingShard) -> RunError:
        return RunError(
            f"{self.plan.part_uri(pending.shard)} was written or removed by another process: "
            "make sure that no other run writes there"
        )
