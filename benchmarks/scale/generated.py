"""Generated files and rows: a listing without storage, and a classifier that reads nothing."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.schema import OK, PREDICTIONS
from catsdogs.score.plan import PendingShard
from catsdogs.score.run_files import RunSettings

FOLDER = "s3://photos/2026"
RUN_SETTINGS = RunSettings({"class_names": ["a", "b"], "model_sha256": "0" * 64}, {"catsdogs.model_sha256": "0" * 64})


def iter_entries(first: int, end: int) -> Iterator[storage.Entry]:
    """Yield listed files by number, in the order of their paths."""
    for i in range(first, end):
        yield storage.Entry(path_of(i), 40_000 + i % 9999, f"{i:032x}")


def path_of(i: int) -> str:
    """Return the path of a file."""
    return f"{FOLDER}/{i // 1000:06d}/{i:09d}.jpg"


class GeneratedListing(storage.Listing):
    """Lists `num_generated` files."""

    num_generated = 0

    def __iter__(self) -> Iterator[storage.Entry]:
        return iter_entries(0, self.num_generated)


class NullClassifier:
    """Yields the rows of each shard at once; it knows its files from its number."""

    def __init__(self, num_files: int, shard_size: int) -> None:
        self._num_files = num_files
        self._shard_size = shard_size

    def __call__(self, shards: Sequence[PendingShard]) -> Iterator[pa.Table]:
        """Yield one table a shard."""
        for pending in shards:
            first = pending.shard * self._shard_size
            yield build_rows(first, min(first + self._shard_size, self._num_files), pending.shard)


def build_rows(first: int, end: int, shard: int) -> pa.Table:
    """Build the rows of some files of a shard: the columns of a part, and those that the classifier adds."""
    count = end - first
    probs = np.resize(np.array([0.51, 0.7, 0.83, 0.999], np.float32), count)
    both = pa.array(np.stack([probs, 1 - probs], axis=1).reshape(-1))
    columns = {
        "path": [path_of(i) for i in range(first, end)],
        "status": [OK] * count,
        "label": ["a"] * count,
        "index": np.zeros(count, np.int32),
        "prob": probs,
        "probs": pa.ListArray.from_arrays(np.arange(0, 2 * count + 1, 2, dtype=np.int32), both),
        "error": pa.nulls(count, pa.string()),
        "width": np.full(count, 404, np.int32),
        "height": np.full(count, 360, np.int32),
        "size_bytes": np.full(count, 45_000, np.int64),
        "true_label": ["a"] * count,
    }
    table = pa.table(columns).cast(PREDICTIONS)
    extra = {"shard": pa.int32(), "retries": pa.int32(), "read_s": pa.float32(), "decode_s": pa.float32()}
    for name, kind in (extra | {"model_s": pa.float32()}).items():
        value = pa.scalar(shard if name == "shard" else 0, kind)
        table = table.append_column(name, pa.repeat(value, count))
    table = table.append_column("version", pa.nulls(count, pa.string()))
    return table.append_column("device_precision", pa.repeat(pa.scalar("none, fp32"), count))
