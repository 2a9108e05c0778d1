"""Rows -> parts, each written whole when its last row is there; the check before `_SUCCESS`."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import __version__, storage
from catsdogs.checkpoint import Checkpoint
from catsdogs.errors import RunError
from catsdogs.schema import OK, PREDICTIONS, parquet_bytes
from catsdogs.score.plan import Plan, part_name

RUN, SUMMARY, SUCCESS, REPORT, STATS = "_run.json", "_summary.json", "_SUCCESS", "_report.html", "_stats"
NUM_BINS = 20
EXAMPLES = 50  # failed rows that the report names


class PartWriter:
    """Gathers the rows of each shard and writes its part; counts what it wrote."""

    def __init__(self, output: str, plan: Plan, model: Checkpoint) -> None:
        self._output = output
        self._sizes = plan.sizes
        self._open: dict[int, list[pa.Table]] = {}
        self._metadata = file_metadata(model)
        self.num_rows = 0
        self.num_parts = 0
        self.by_status: Counter[str] = Counter()
        self.by_label: Counter[str] = Counter()
        self.histogram = np.zeros(NUM_BINS, dtype=np.int64)
        self.examples: list[tuple[str, str, str]] = []

    def add(self, rows: pa.Table) -> None:
        """Take rows of any shards, in any order.

        Raises:
            RunError: a finished part cannot be written.
        """
        shards = rows["shard"].to_numpy()
        for shard in np.unique(shards).tolist():
            own = rows.filter(pa.array(shards == shard)).drop_columns(["shard"])
            tables = self._open.setdefault(shard, [])
            tables.append(own)
            if sum(table.num_rows for table in tables) == self._sizes[shard]:
                self._write(shard, pa.concat_tables(self._open.pop(shard)))
        self.num_rows += rows.num_rows
        self._count(rows)

    def failures(self) -> str:
        """Say how many rows have which status but ok."""
        return "  ".join(f"{status} {count:,}" for status, count in sorted(self.by_status.items()) if status != OK)

    def _write(self, shard: int, table: pa.Table) -> None:
        table = table.sort_by("path").cast(PREDICTIONS)
        name = part_name(shard)
        storage.write_bytes(
            storage.join(self._output, name), parquet_bytes(table.replace_schema_metadata(self._metadata))
        )
        statuses = Counter(table["status"].to_pylist())
        record = {"part": name, "rows": table.num_rows, "by_status": statuses}
        storage.write_bytes(
            storage.join(self._output, STATS, name.replace(".parquet", ".json")), json.dumps(record).encode()
        )
        self.num_parts += 1

    def _count(self, rows: pa.Table) -> None:
        statuses = rows["status"].to_pylist()
        self.by_status.update(statuses)
        self.by_label.update(label for label in rows["label"].to_pylist() if label is not None)
        probs = rows["prob"].drop_null().to_numpy()
        self.histogram += np.histogram(probs, bins=NUM_BINS, range=(0, 1))[0]
        for i, status in enumerate(statuses):
            if status != OK and len(self.examples) < EXAMPLES:
                self.examples.append((rows["path"][i].as_py(), status, rows["error"][i].as_py() or ""))


def file_metadata(model: Checkpoint) -> dict[str, str]:
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


def check_parts(output: str, plan: Plan) -> None:
    """Read the paths back: each part holds the paths of its plan, each once, and nothing else is there.

    Raises:
        RunError: names the first part that differs.
    """
    found = [name for name in storage.list_names(output) if name.startswith("part-")]
    expected = [part_name(shard) for shard in range(len(plan.manifest))]
    if found != expected:
        raise RunError(f"{output}: expected {len(expected)} parts, found {len(found)}; run again with a new --output")
    last = ""
    for name, manifest in zip(expected, plan.manifest, strict=True):
        written, planned = (_paths(uri) for uri in (storage.join(output, name), manifest))
        if written != sorted(planned) or len(set(written)) != len(written) or set(written) & {last}:
            raise RunError(f"{output}/{name}: its rows are not the files of its plan; run again with a new --output")
        last = written[-1]


def _paths(uri: str) -> list[str]:
    paths: list[str] = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["path"])["path"].to_pylist()
    return paths
