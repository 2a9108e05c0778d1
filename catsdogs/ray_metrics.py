"""Metrics of `score` and `train` in Ray: the nodes of a cluster export them to Prometheus, as `ray_catsdogs_...`.

On a Ray that the command started, nothing is recorded: it ends with the command and is not scraped.
"""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.metrics import Counter, Gauge

from catsdogs import start


def count_scored_rows(output: str, rows: pa.Table) -> None:
    """Count rows that arrive in the driver, those of a repeated attempt again, and the repeated requests for files.

    Args:
        rows: `status`; `retries`, int.
    """
    if not _is_exported():
        return
    counter = Counter("catsdogs_score_rows", "Rows that score has computed.", ("output", "status"))
    for item in rows["status"].value_counts().to_pylist():
        counter.inc(item["counts"], {"output": output, "status": item["values"]})
    if num_retries := pc.sum(rows["retries"]).as_py():
        counter = Counter("catsdogs_score_retries", "Requests for files that were repeated.", ("output",))
        counter.inc(num_retries, {"output": output})


def set_epoch(run: str, row: Mapping[str, object]) -> None:
    """Set a gauge for each number in a row of `summary.csv`, such as `catsdogs_train_val_loss`."""
    if not _is_exported():
        return
    for column, value in row.items():
        if isinstance(value, int | float):
            name = f"catsdogs_train_{column.removeprefix('train_')}"
            Gauge(name, f"{column} of the last finished epoch.", ("run",)).set(value, {"run": run})


def _is_exported() -> bool:
    return ray.is_initialized() and start.on_existing_cluster()
