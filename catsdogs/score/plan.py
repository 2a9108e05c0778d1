"""The plan of an output, on storage: which files each part has, and which of them are not scored yet.

    _manifest/_plan.json                    the size of each shard, and where an unfinished listing stopped
    _manifest/part-00042.parquet            the manifest of shard 42: path, size and version of its files
    part-00042.parquet                      their rows; a shard is pending while its part is missing
    _manifest/_redo/part-00042.parquet      rows of a finished part to score again; removed once they are replaced

To resume, a run lists these names; it reads no rows of finished parts. A manifest whose shard `_plan.json` lacks is not
in the plan: a listing was interrupted there, and the next one overwrites it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.lease import LeaseClaim
from catsdogs.schema import parquet_bytes, read_table
from catsdogs.score.threads import map_in_threads

MANIFEST, RESCORE, PLAN = "_manifest", "_redo", "_plan.json"
RUN, SUMMARY, SUCCESS, REPORT, STATS = "_run.json", "_summary.json", "_SUCCESS", "_report.html", "_stats"
# Keys of `_plan.json` and the attributes of Plan that they store.
STORED_ATTRIBUTES = {
    "sizes": "sizes",
    "generations": "listing_first_shards",
    "unlisted": "unlisted",
    "listed_to": "listing_cursor",
    "relisting": "relisting",
    "other_files": "other_files",
}


def parse_record(uri: str, content: bytes) -> dict[str, Any]:
    """Parse one of an output's JSON files; InputError if it is damaged."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InputError(f"{uri}: expected a record of catsdogs: {error!r}") from error
    if not isinstance(record, dict):
        raise InputError(f"{uri}: expected a record of catsdogs, found {type(record).__name__}")
    return record


def part_name(shard: int) -> str:
    """Format the name of a shard's part."""
    return f"part-{shard:05d}.parquet"


@dataclass(frozen=True, slots=True)
class PendingShard:
    """The files of a shard to score, listed at `uri`: all of them, or the rows of its part to score again."""

    shard: int
    uri: str
    num_rows: int
    is_rescore: bool


@dataclass
class Plan:
    """The files of an output, in shards.

    Attributes:
        sizes: number of files of each shard.
        listing_first_shards: the first shard of each listing that added files; within one listing, paths ascend.
        unlisted: folders and files that could not be listed, with the reason.
        listing_cursor: the last path of an unfinished listing; None if the listing is finished.
        relisting: the unfinished listing is a later one, of a plan that was complete before.
        other_files: number of files that are no images, by extension, as of the last listing that changed the plan.
        version: version of `_plan.json` as it was last read or written.
    """

    output: str
    sizes: list[int] = field(default_factory=list)
    listing_first_shards: list[int] = field(default_factory=list)
    unlisted: dict[str, str] = field(default_factory=dict)
    listing_cursor: str | None = ""
    relisting: bool = False
    other_files: dict[str, int] = field(default_factory=dict)
    version: str | None = None

    @classmethod
    def load(cls, output: str) -> "Plan":
        """Read the plan of an output, or return an empty one; InputError if it cannot be read."""
        uri = storage.join(output, MANIFEST, PLAN)
        found = storage.read_versioned(uri)
        if found is None:
            return cls(output)
        record = parse_record(uri, found[0])
        if unknown := record.keys() - STORED_ATTRIBUTES.keys():
            raise InputError(f"{uri}: expected a plan of catsdogs, found {sorted(unknown)}")
        stored = {STORED_ATTRIBUTES[key]: value for key, value in record.items()}
        plan = cls(output, **stored, version=found[1])
        if not _is_valid(plan):
            raise InputError(f"{uri}: expected a plan of catsdogs, but a value is missing or of another type")
        return plan

    def save(self) -> None:
        """Write the plan; RunError if another process wrote it after it was read."""
        uri = storage.join(self.output, MANIFEST, PLAN)
        record = {key: getattr(self, name) for key, name in STORED_ATTRIBUTES.items()}
        content = json.dumps(record).encode()
        if self.version is None:
            written = storage.create_bytes(uri, content)
        else:
            written = storage.replace_bytes(uri, content, self.version)
        found = storage.read_versioned(uri)
        if not written or found is None or found[0] != content:
            raise RunError(f"{uri} was written by another process: make sure that no other run writes there")
        self.version = found[1]

    @property
    def num_files(self) -> int:
        """Number of files of the plan; each becomes one row."""
        return sum(self.sizes)

    def manifest_uri(self, shard: int) -> str:
        """Return the URI of a shard's manifest."""
        return storage.join(self.output, MANIFEST, part_name(shard))

    def rescore_uri(self, shard: int) -> str:
        """Return the URI of the list of a finished part's rows to score again."""
        return storage.join(self.output, MANIFEST, RESCORE, part_name(shard))

    def part_uri(self, shard: int) -> str:
        """Return the URI of a shard's part."""
        return storage.join(self.output, part_name(shard))

    def pending_shards(self, lease: LeaseClaim, with_rescores: bool) -> dict[int, PendingShard]:
        """Find the shards to score, by number; those of finished parts only `with_rescores`."""
        finished = set(storage.list_names(self.output))
        pending = {
            shard: PendingShard(shard, self.manifest_uri(shard), size, is_rescore=False)
            for shard, size in enumerate(self.sizes)
            if part_name(shard) not in finished
        }
        shards = self.rescore_shards() if with_rescores else []
        requests = map_in_threads(lambda shard: self._read_request(shard, shard in pending, lease), shards)
        return pending | {request.shard: request for request in requests if request is not None}

    def _read_request(self, shard: int, is_pending: bool, lease: LeaseClaim) -> PendingShard | None:
        """Read which rows of a part are to be scored again; None if its part was removed, so that all of them are."""
        uri = self.rescore_uri(shard)
        files = read_files(uri)
        if not is_pending:
            return PendingShard(shard, uri, files.num_rows, is_rescore=True)
        self.update_versions(shard, files, lease)  # all files are scored in the versions listed last
        storage.remove(uri)
        return None

    def rescore_shards(self) -> list[int]:
        """Find the finished parts with rows to score again."""
        names = storage.list_names(storage.join(self.output, MANIFEST, RESCORE))
        return [int(found[1]) for name in names if (found := re.fullmatch(r"part-(\d+)\.parquet", name))]

    def update_versions(self, shard: int, files: pa.Table, lease: LeaseClaim) -> None:
        """Update the size and version of some files in a shard's manifest."""
        manifest = read_files(self.manifest_uri(shard))
        lease.write(self.manifest_uri(shard), parquet_bytes(replace_rows(manifest, files)))

    def request_rescore(self, shard: int, files: pa.Table, lease: LeaseClaim) -> None:
        """Request that rows of a finished part are scored again, in addition to earlier requests."""
        before = storage.read_versioned(self.rescore_uri(shard))
        if before is not None:
            requested = read_table(before[0])
            others = pc.invert(pc.is_in(requested["path"], files["path"]))
            files = pa.concat_tables([requested.filter(others), files])
        lease.write(self.rescore_uri(shard), parquet_bytes(files))


def _is_valid(plan: Plan) -> bool:
    """Return whether all attributes of a plan have their types, and its listings begin at shard 0."""
    sizes, firsts = plan.sizes, plan.listing_first_shards
    return (
        _is_list_of_counts(sizes)
        and _is_list_of_counts(firsts)
        and firsts == sorted(firsts)
        and (not sizes or firsts[:1] == [0])
        and isinstance(plan.unlisted, dict)
        and isinstance(plan.listing_cursor, str | None)
        and isinstance(plan.relisting, bool)
        and isinstance(plan.other_files, dict)
        and _is_list_of_counts(list(plan.other_files.values()))
    )


def _is_list_of_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def build_files_table(entries: Iterable[storage.Entry], shard: int) -> pa.Table:
    """Build a manifest from listed files."""
    files = storage.build_files_table(entries)
    column = pa.array([shard] * files.num_rows, pa.int32())
    return files.append_column(pa.field("shard", pa.int32(), nullable=False), column)


def read_files(uri: str) -> pa.Table:
    """Read a manifest, or the list of rows to score again."""
    return read_table(storage.read_bytes(uri))


def replace_rows(table: pa.Table, rows: pa.Table) -> pa.Table:
    """Replace the rows of a table that have the same paths; keep the order."""
    both = pa.concat_tables([rows.select(table.column_names).cast(table.schema), table])
    old = pa.array(np.arange(rows.num_rows, both.num_rows, dtype=np.int32))
    order = pc.coalesce(pc.index_in(table["path"], rows["path"]), old)
    return both.take(order).replace_schema_metadata(table.schema.metadata)
