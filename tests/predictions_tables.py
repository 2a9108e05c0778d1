"""Results as `score` and `evaluate` write them, from numbers that a test draws."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catsdogs.predictions import build_predictions
from catsdogs.schema import parquet_bytes

CLASSES = ("cat", "dog", "fox")
Probs = npt.NDArray[np.float32]


def draw_probs(num_rows: int, seed: int, num_classes: int = 3) -> Probs:
    """Draw probabilities (num_rows, num_classes)."""
    return np.random.default_rng(seed).dirichlet([0.5] * num_classes, num_rows).astype(np.float32)


def build_table(
    paths: Sequence[str],
    probs_NK: Probs,
    class_names: Sequence[str] = CLASSES,
    failed: Sequence[int] = (),
    embeddings_ND: npt.NDArray[np.float32] | None = None,
) -> pa.Table:
    """Build the predictions of files; those at the positions `failed` are truncated."""
    statuses = ["truncated" if i in failed else "ok" for i in range(len(paths))]
    sizes = pa.array([None if i in failed else 300 + i % 7 for i in range(len(paths))], pa.int32())
    rows = pa.table(
        {
            "path": list(paths),
            "size_bytes": pa.array(range(1000, 1000 + len(paths)), pa.int64()),
            "status": statuses,
            "error": pa.array([None if status == "ok" else "ends early" for status in statuses], pa.string()),
            "width": sizes,
            "height": sizes,
        }
    )
    return build_predictions(rows, probs_NK, class_names, embeddings_ND)


def to_parquet(table: pa.Table, class_names: Sequence[str] = CLASSES, model: str = "0" * 64) -> bytes:
    """Write a table with the metadata of a scoring."""
    metadata = {"catsdogs.class_names": json.dumps(list(class_names)), "catsdogs.model_sha256": model}
    return parquet_bytes(table.replace_schema_metadata(metadata))


def list_parts(table: pa.Table, class_names: Sequence[str] = CLASSES, shard_size: int = 50) -> dict[str, bytes]:
    """Return the files of a finished scoring by name."""
    starts = range(0, table.num_rows, shard_size)
    parts = {
        f"part-{i:05}.parquet": to_parquet(table.slice(start, shard_size).sort_by("path"), class_names)
        for i, start in enumerate(starts)
    }
    return parts | {"_summary.json": json.dumps({"rows": table.num_rows}).encode(), "_run.json": b"{}", "_SUCCESS": b""}


def write_scoring(folder: Path, table: pa.Table, class_names: Sequence[str] = CLASSES) -> str:
    """Write a finished scoring; return its path."""
    folder.mkdir(parents=True)
    for name, content in list_parts(table, class_names).items():
        (folder / name).write_bytes(content)
    return str(folder)
