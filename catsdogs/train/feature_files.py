"""The files of features, which `train/features.py` computes: Parquet with one row per image, and which run uses them.

    RUN/features.json                        where the features of the run are: in its folder, or in that of another run
    RUN/features/HASH/train-00000.parquet    `path`, `version`, `status`, ... and the features of all views of an image
    RUN/features/HASH/validation-00000.parquet
    RUN/features/HASH/features.json          all parts are there

Features may be larger than memory: each worker copies them to a memory-mapped file on its local disk.

Shapes: N rows, V views of an image, D features.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.checkpoint import NUM_FEATURES
from catsdogs.errors import InputError, NotRetryableError, RunError
from catsdogs.schema import read_table
from catsdogs.train.run_folder import FEATURES_LOCATION

COMPLETE_MARKER = "features.json"
PART_ROWS = 256  # a multiple of every batch

FeatureArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class FeatureTable:
    """Files and their features, float32 (N, V, D), zeros for files without an image."""

    rows: pa.Table
    features_NVD: FeatureArray


def format_part(split: str, part: int) -> str:
    """Format the name of a part."""
    return f"{split}-{part:05}.parquet"


def write_location(run_uri: str, features_uri: str) -> None:
    """Write where the features of a run are, relative to the folder of all runs."""
    location = features_uri.removeprefix(f"{storage.parent(run_uri)}/")
    storage.write_bytes(storage.join(run_uri, FEATURES_LOCATION), json.dumps({"features": location}).encode())


def find_location(run_uri: str) -> str | None:
    """Return the URI of the complete features of a run, or None."""
    found = storage.read_versioned(storage.join(run_uri, FEATURES_LOCATION))
    if found is None:
        return None
    try:
        uri = storage.join(storage.parent(run_uri), json.loads(found[0])["features"])
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged: as if there were none
        return None
    return uri if storage.exists(storage.join(uri, COMPLETE_MARKER)) else None


def iter_parts(uri: str, split: str = "") -> Iterator[FeatureTable]:
    """Yield the parts of a split, or of all.

    Raises:
        RunError: a part is damaged.
    """
    names = sorted(name for name in storage.list_names(uri) if name.startswith(split) and name.endswith(".parquet"))
    return (_read_part(uri, name) for name in names)


def load_features(uri: str, split: str, num_rows: int, num_views: int) -> FeatureTable:
    """Load the features of one split to a memory-mapped temporary file on the local disk.

    Raises:
        RunError: a part is damaged, or the disk is full; the latter is not retryable.
    """
    features_NVD = allocate_on_disk((num_rows, num_views, NUM_FEATURES))
    tables = []
    for part, start in enumerate(range(0, num_rows, PART_ROWS)):
        table = _read_part(uri, format_part(split, part))
        if table.features_NVD.shape[1] != num_views:
            raise RunError(f"{uri}: expected {num_views} views, found {table.features_NVD.shape[1]}; remove it")
        features_NVD[start : start + table.rows.num_rows] = table.features_NVD
        tables.append(table.rows)
    rows = pa.concat_tables(tables)
    if rows.num_rows != num_rows:
        raise RunError(f"{uri}: expected {num_rows} rows of {split}, found {rows.num_rows}; remove it")
    return FeatureTable(rows, features_NVD)


def _read_part(uri: str, name: str) -> FeatureTable:
    part_uri = storage.join(uri, name)
    try:
        table = read_table(storage.read_bytes(part_uri))
        values = table["features"].combine_chunks().flatten().to_numpy()
        features_NVD = values.reshape(table.num_rows, -1, NUM_FEATURES)
    except (InputError, pa.ArrowException, KeyError, ValueError) as error:
        raise RunError(f"{part_uri}: expected features, but {error}; remove {uri}") from error
    return FeatureTable(table.drop_columns(["features"]), features_NVD)


def allocate_on_disk(shape: tuple[int, ...]) -> FeatureArray:
    """Allocate a memory-mapped temporary file on the local disk; NotRetryableError if the disk is full."""
    num_bytes = math.prod(shape) * np.dtype(np.float32).itemsize
    with tempfile.TemporaryFile() as file:
        try:  # else a write to a full disk would end the process with SIGBUS
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise NotRetryableError(
                f"no room for {num_bytes / 2**30:.1f} GiB in {tempfile.gettempdir()}: {error}; free space there, or "
                "set TMPDIR to another disk"
            ) from error
        return np.memmap(file, np.float32, "w+", shape=shape)
