"""The durable plan of an output: which files each part holds, and what of it is still open.

`_manifest/part-00042.parquet` lists the files of the output's `part-00042.parquet`. `_manifest/_plan.json` says which
of them count, and how far an unfinished listing came. `_manifest/_redo/part-00042.parquet` lists the rows of a
finished part that are to be labelled again; it goes when that is done. So a shard is open where its part is not
there, or where its redo is: resuming costs one listing of names, whatever the number of rows.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.schema import FILES, parquet_bytes, read_table

MANIFEST, RESCORE, PLAN = "_manifest", "_redo", "_plan.json"
RUN, SUMMARY, SUCCESS, REPORT, STATS = "_run.json", "_summary.json", "_SUCCESS", "_report.html", "_stats"
PLANNED = FILES.append(pa.field("shard", pa.int32(), nullable=False))


def part_name(shard: int) -> str:
    """Name the part of a shard."""
    return f"part-{shard:05d}.parquet"


@dataclass(frozen=True)
class PendingShard:
    """Files of one shard to label: all of them, or some again."""

    shard: int
    uri: str
    num_rows: int
    is_rescore: bool


@dataclass
class Plan:
    """The files of an output.

    Attributes:
        sizes: rows of each shard.
        generations: the first shard of each listing that added some; within one, paths ascend.
        unlisted: what could not be listed, with the reason.
        listed_to: the path up to which an unfinished listing came; None where it is finished.
        relisting: another listing found something, and is to be gone on with.
        version: of the file that was read or written last.
    """

    output: str
    sizes: list[int] = field(default_factory=list)
    listing_first_shards: list[int] = field(default_factory=list)
    unlisted: dict[str, str] = field(default_factory=dict)
    listing_cursor: str | None = ""
    relisting: bool = False
    version: str | None = None

    @classmethod
    def load(cls, output: str) -> "Plan":
        """Read the plan of an output; one that is still empty where there is none.

        Raises:
            InputError: it cannot be read.
        """
        found = storage.read_versioned(storage.join(output, MANIFEST, PLAN))
        if found is None:
            return cls(output)
        try:
            record: dict[str, Any] = json.loads(found[0])
            return cls(output, **record, version=found[1])
        except (ValueError, TypeError) as error:
            raise InputError(f"{output}/{MANIFEST}/{PLAN}: expected a plan of catsdogs: {error}") from error

    def save(self) -> None:
        """Write the plan: from here on it counts.

        Raises:
            RunError: somebody else wrote it since.
        """
        uri = storage.join(self.output, MANIFEST, PLAN)
        record = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("output", "version")}
        content = json.dumps(record).encode()
        if self.version is None:
            written = storage.create_bytes(uri, content)
        else:
            written = storage.replace_bytes(uri, content, self.version)
        found = storage.read_versioned(uri)
        if not written or found is None or found[0] != content:
            raise RunError(f"{uri} was written by somebody else: this scoring stops until no other runs there")
        self.version = found[1]

    @property
    def num_files(self) -> int:
        """Files of the plan; each ends as one row."""
        return sum(self.sizes)

    def manifest_uri(self, shard: int) -> str:
        """Name the list of a shard's files."""
        return storage.join(self.output, MANIFEST, part_name(shard))

    def rescore_uri(self, shard: int) -> str:
        """Name the list of a finished part's rows that are to be labelled again."""
        return storage.join(self.output, MANIFEST, RESCORE, part_name(shard))

    def part_uri(self, shard: int) -> str:
        """Name a shard's part."""
        return storage.join(self.output, part_name(shard))

    def pending_shards(self) -> dict[int, PendingShard]:
        """Find what is to be labelled yet, by shard."""
        finished = set(storage.list_names(self.output))
        pending = {
            shard: PendingShard(shard, self.manifest_uri(shard), size, is_rescore=False)
            for shard, size in enumerate(self.sizes)
            if part_name(shard) not in finished
        }
        for shard in self.rescore_shards():
            files = read_files(self.rescore_uri(shard))
            if shard in pending:  # the part is gone since: its files are labelled as the redo names them
                self.update_versions(shard, files)
                storage.remove(self.rescore_uri(shard))
            else:
                pending[shard] = PendingShard(shard, self.rescore_uri(shard), files.num_rows, is_rescore=True)
        return pending

    def rescore_shards(self) -> list[int]:
        """Find the finished parts of which rows are to be labelled again."""
        names = storage.list_names(storage.join(self.output, MANIFEST, RESCORE))
        return [int(found[1]) for name in names if (found := re.fullmatch(r"part-(\d+)\.parquet", name))]

    def update_versions(self, shard: int, files: pa.Table) -> None:
        """Put files into a shard's manifest as they were read last."""
        storage.write_bytes(
            self.manifest_uri(shard), parquet_bytes(replace_rows(read_files(self.manifest_uri(shard)), files))
        )

    def request_rescore(self, shard: int, files: pa.Table) -> None:
        """Order rows of a finished part to be labelled again, beside those ordered before."""
        before = storage.read_versioned(self.rescore_uri(shard))
        if before is not None:
            ordered = read_table(before[0])
            files = pa.concat_tables([ordered.filter(_others(ordered, files)), files])
        storage.write_bytes(self.rescore_uri(shard), parquet_bytes(files))


def build_files_table(entries: Iterable[storage.Entry], shard: int) -> pa.Table:
    """Lay listed files out as rows of a manifest."""
    listed = list(entries)
    columns = [
        [e.path for e in listed],
        [e.size_bytes for e in listed],
        [e.version for e in listed],
        [shard] * len(listed),
    ]
    return pa.table(columns, schema=PLANNED)


def read_files(uri: str) -> pa.Table:
    """Read one file of a manifest."""
    return read_table(storage.read_bytes(uri))


def replace_rows(table: pa.Table, rows: pa.Table) -> pa.Table:
    """Put rows in the place of those with the same paths; the order stays."""
    new_by_path = {path: i for i, path in enumerate(rows["path"].to_pylist())}
    both = pa.concat_tables([table, rows.select(table.column_names).cast(table.schema)])
    order = [
        table.num_rows + new_by_path[path] if path in new_by_path else i
        for i, path in enumerate(table["path"].to_pylist())
    ]
    return both.take(pa.array(order, pa.int64())).replace_schema_metadata(table.schema.metadata)


def _others(table: pa.Table, rows: pa.Table) -> pa.Array:
    named = set(rows["path"].to_pylist())
    return pa.array([path not in named for path in table["path"].to_pylist()], pa.bool_())
