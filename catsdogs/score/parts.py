"""Rows -> parts, each committed whole; the record of each part.

The object is the commit: a part that is there is finished. Its record in `_stats` follows, and is made again from the
part where a driver died in between.
"""

import dataclasses
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import __version__, storage
from catsdogs.errors import InputError, RunError
from catsdogs.saved import CheckpointFiles
from catsdogs.schema import PREDICTIONS, WITH_EMBEDDINGS, parquet_bytes, read_table
from catsdogs.score.plan import STATS, PendingShard, Plan, part_name, read_files, replace_rows

NUM_BINS = 20
RECORDS_PER_READ = 64  # small files
# What passes through the model's stage beside the columns of the output: the shard, the version of the file that was
# read, and what the row cost.
PASSTHROUGH_COLUMNS = ("shard", "version", "retries", "read_s", "decode_s")


@dataclass(frozen=True)
class PartRecord:
    """What one part holds; `histogram` counts `prob` in equal steps from 0 to 1."""

    part: str
    rows: int
    by_status: dict[str, int]
    by_label: dict[str, int]
    histogram: list[int]

    @classmethod
    def from_table(cls, part: str, table: pa.Table) -> "PartRecord":
        """Count the rows of a part."""
        histogram = np.histogram(table["prob"].drop_null().to_numpy(), bins=NUM_BINS, range=(0, 1))[0]
        by_status, by_label = (_counts(table[name].drop_null()) for name in ("status", "label"))
        return cls(part, table.num_rows, by_status, by_label, histogram.tolist())

    def write(self, output: str) -> None:
        """Write the record to `_stats`."""
        storage.write_bytes(_record_uri(output, self.part), json.dumps(dataclasses.asdict(self)).encode())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def _record_uri(output: str, part: str) -> str:
    return storage.join(output, STATS, part.replace(".parquet", ".json"))


def read_records(output: str, shards: Sequence[int]) -> list[PartRecord | None]:
    """Read the records of parts; None for one that is missing or damaged."""
    entries = [storage.Entry(_record_uri(output, part_name(shard))) for shard in shards]
    records: list[PartRecord | None] = []
    for start in range(0, len(entries), RECORDS_PER_READ):
        records += [
            _parsed(fetched.image_bytes) for fetched in storage.fetch(entries[start : start + RECORDS_PER_READ])
        ]
    return records


def _parsed(content: bytes | None) -> PartRecord | None:
    try:
        return None if content is None else PartRecord(**json.loads(content))
    except (ValueError, TypeError):
        return None


def read_part(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a finished part.

    Raises:
        RunError: it cannot be read; names it.
    """
    try:
        return read_table(storage.read_bytes(uri), columns)
    except (InputError, pa.ArrowException) as error:
        raise unreadable(uri, error) from error


def unreadable(uri: str, error: Exception) -> RunError:
    """Say what to do about a damaged part."""
    return RunError(f"{uri}: expected a finished part, but {error}; remove it")


def build_file_metadata(model: CheckpointFiles) -> dict[str, str]:
    """Say in a part's metadata which model made it."""
    preprocessing = model.preprocessing
    return {
        "catsdogs.version": __version__,
        "catsdogs.model_sha256": model.sha256,
        "catsdogs.class_names": json.dumps(model.class_names),
        "catsdogs.preprocessing": json.dumps(
            {
                "img_size": preprocessing.img_size,
                "resize_size": preprocessing.resize_size,
                "crop_pct": preprocessing.crop_pct,
                "interpolation": "bilinear",
                "mean": preprocessing.mean,
                "std": preprocessing.std,
            }
        ),
    }


class PartWriter:
    """Gathers the rows of each open shard and commits its part as soon as the last is there.

    It runs in the driver, which holds the lease: when the driver dies nobody is left who commits.
    """

    def __init__(
        self, plan: Plan, pending: dict[int, PendingShard], metadata: dict[str, str], check_lease: Callable[[], None]
    ) -> None:
        self._plan = plan
        self._work = pending
        self._metadata = metadata
        self._check_lease = check_lease
        self._gathered: dict[int, list[pa.Table]] = {}
        self.num_rows = 0
        self.num_committed = 0
        self.by_status: Counter[str] = Counter()
        self.by_device_precision: Counter[str] = Counter()
        self.retries = 0
        self.busy_s: defaultdict[str, float] = defaultdict(float)

    @property
    def incomplete(self) -> list[int]:
        """Shards of which some rows came, not all."""
        return list(self._gathered)

    def add(self, rows: pa.Table) -> None:
        """Take rows of any shards, in any order.

        Raises:
            RunError: a part cannot be written, or the output is another driver's now.
        """
        self._count(rows)
        shards = rows["shard"].to_numpy()
        for shard in np.unique(shards).tolist():
            gathered = self._gathered.setdefault(shard, [])
            gathered.append(rows.filter(pa.array(shards == shard)))
            if sum(table.num_rows for table in gathered) >= self._work[shard].num_rows:
                began = time.monotonic()
                self._commit(self._work[shard], pa.concat_tables(self._gathered.pop(shard)))
                self.busy_s["write"] += time.monotonic() - began
                self.num_committed += 1

    def drop_incomplete(self) -> None:
        """Take back the rows of shards that were not committed: they will come again."""
        for tables in self._gathered.values():
            for rows in tables:
                self.num_rows -= rows.num_rows
                self.by_status.subtract(_counts(rows["status"]))
                self.by_device_precision.subtract(_counts(rows["device_precision"]))
        self._gathered.clear()

    def _count(self, rows: pa.Table) -> None:
        self.num_rows += rows.num_rows
        self.by_status.update(_counts(rows["status"]))
        self.by_device_precision.update(_counts(rows["device_precision"]))
        self.retries += int(rows["retries"].to_numpy().sum())
        for stage in ("read", "decode", "model"):
            self.busy_s[stage] += float(rows[f"{stage}_s"].to_numpy().sum())

    def _commit(self, pending: PendingShard, rows: pa.Table) -> None:
        schema = WITH_EMBEDDINGS if "embedding" in rows.column_names else PREDICTIONS
        table = rows.select(schema.names).sort_by("path").cast(schema)
        iter_planned_files = sorted(read_files(pending.uri)["path"].to_pylist())
        assert table["path"].to_pylist() == iter_planned_files, (
            f"rows of shard {pending.shard} are not those of its plan"
        )
        if pending.is_rescore:
            self._replace(pending, table, rows)
        else:
            self._check_lease()
            if not storage.create_bytes(self._plan.part_uri(pending.shard), self._part_bytes(table)):
                raise self._overtaken(pending)
            PartRecord.from_table(part_name(pending.shard), table).write(self._plan.output)

    def _replace(self, pending: PendingShard, table: pa.Table, rows: pa.Table) -> None:
        """Put rows into a finished part; then into its manifest, and the order to do so is done."""
        uri = self._plan.part_uri(pending.shard)
        found = storage.read_versioned(uri)
        if found is None:
            raise self._overtaken(pending)
        try:
            table = replace_rows(read_table(found[0]), table)
        except pa.ArrowException as error:
            raise unreadable(uri, error) from error
        self._check_lease()
        if not storage.replace_bytes(uri, self._part_bytes(table), found[1]):
            raise self._overtaken(pending)
        PartRecord.from_table(part_name(pending.shard), table).write(self._plan.output)
        # Of a file that could not be read the version stays as it was listed.
        self._plan.update_versions(pending.shard, rows.filter(pc.is_valid(rows["version"])))
        storage.remove(pending.uri)

    def _part_bytes(self, table: pa.Table) -> bytes:
        return parquet_bytes(table.replace_schema_metadata(self._metadata))

    def _overtaken(self, pending: PendingShard) -> RunError:
        return RunError(
            f"{self._plan.part_uri(pending.shard)} was written or removed by somebody else: this scoring stops until no "
            "other runs there"
        )
