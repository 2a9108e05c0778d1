"""Measure what Ray Data and the driver allow: the dataset of `score` with pretended GPUs, and stages that do nothing.

python -m benchmarks.scale.null_pipeline --gpus 8 32

Files are not read and no model runs. Manifests, blocks, Ray's tasks and actors are those of `score`. It prints a JSON
line for each number of GPUs.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import ray

from catsdogs import classify, data
from catsdogs.checkpoint import CheckpointFiles, read_checkpoint
from catsdogs.schema import FILES, OK, PREDICTIONS, parquet_bytes
from catsdogs.score.parts import PASSTHROUGH_COLUMNS

SHARD_ROWS = 10_000  # as `--shard-size`
JPEG_BYTES = 41_000  # the mean of the photographs of `cats_and_dogs_filtered`
NUM_DECODERS = 2
CLASS_NAMES = ("cats", "dogs")
WARM_UP_SHARE = 0.3  # of the rows
START_S = 600  # in which all actors start; else a few of them get most blocks while the others take the CPU to start
FEW_GPUS, MANY_GPUS = 8, 32
MIN_BLOCK_ROWS, MIN_ROWS_PER_S = 2000, 100_000.0
# With 32, the processes of the pretended GPUs share the cores with the driver, and Ray Data looks at each in each pass.
MAX_DRIVER_MS = {FEW_GPUS: 12.0, MANY_GPUS: 16.0}


@dataclass(frozen=True)
class Result:
    """What a run made after its warm-up.

    Attributes:
        rows_per_call: the rows of each call of an actor; the last one of a shard has fewer.
        driver_ms: CPU time of the driver for each block.
    """

    gpus: int
    jpeg_bytes: int
    rows: int
    rows_per_call: list[int]
    rows_per_s: float
    driver_ms: float

    @property
    def is_good(self) -> bool:
        """Whether the goals are reached; that of speed is for MANY_GPUS and no JPEGs."""
        is_fast = self.rows_per_s >= MIN_ROWS_PER_S or self.gpus < MANY_GPUS or self.jpeg_bytes > 0
        is_cheap = self.driver_ms <= MAX_DRIVER_MS.get(self.gpus, math.inf)
        return is_fast and is_cheap and float(np.median(self.rows_per_call)) >= MIN_BLOCK_ROWS


@dataclass(frozen=True)
class NullDecode(data.DecodeForInference):
    """Callable for map_batches that makes decoded batches without reading files."""

    jpeg_bytes: int

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Yield the batches of a block."""
        for start in range(0, files.num_rows, self.batch_size):
            yield self._fill(files.slice(start, self.batch_size))

    def _fill(self, files: pa.Table) -> pa.Table:
        num_rows = files.num_rows
        columns = {name: files[name] for name in files.column_names}
        columns["jpeg"] = pa.array([bytes(self.jpeg_bytes)] * num_rows, pa.large_binary())
        columns["status"] = pa.array([OK] * num_rows, pa.string())
        columns["retries"] = pa.array(np.zeros(num_rows, np.int32))
        columns["read_s"] = columns["decode_s"] = pa.array(np.zeros(num_rows, np.float32))
        return pa.table(columns)


class NullClassifier(classify.Classifier):
    """A classifier without a model; `model_s` is the number of rows of the call."""

    def __init__(self, *arguments: Any) -> None:
        """Ignore the arguments of Classifier."""

    def __call__(self, blocks: pa.Table) -> pa.Table:
        """Return null predictions of a packed block."""
        (rows,) = data.unpack_blocks(blocks)
        columns = {name: rows[name] for name in ("path", "status", *PASSTHROUGH_COLUMNS)}
        nulls = {field.name: pa.nulls(rows.num_rows, field.type) for field in PREDICTIONS if field.name not in columns}
        columns["device_precision"] = pa.array(["null"] * rows.num_rows, pa.string())
        columns["model_s"] = pa.array(np.full(rows.num_rows, rows.num_rows, np.float32))
        return data.pack_block(pa.table(columns | nulls))


def measure(gpus: int, shards: int, jpeg_bytes: int, work: Path) -> Result:
    """Run the dataset of `score` on a separate local Ray that counts GPUs that do not exist."""
    from benchmarks.checkpoints import save_random  # not at the top: each actor would import torch

    save_random(work / "model", CLASS_NAMES)
    uris = _write_manifests(work, shards)
    gpu_type = {"accelerator_type:H100": 1.0}
    cpus = NUM_DECODERS + 1
    ray.init("local", num_cpus=cpus, num_gpus=gpus, resources=gpu_type, include_dashboard=False, log_to_driver=False)
    try:
        dataset = _build_dataset(uris, gpus, jpeg_bytes, read_checkpoint(str(work / "model")))
        with data.quiet_ray_loggers(), data.without_cluster_actors(on_local_ray=True):
            return _run(dataset, gpus, jpeg_bytes, shards * SHARD_ROWS)
    finally:
        ray.shutdown()


def _write_manifests(work: Path, shards: int) -> list[str]:
    paths = pa.array([f"s3://bucket/images/{i:06}.jpg" for i in range(SHARD_ROWS)])
    sizes, versions = pa.array([JPEG_BYTES] * SHARD_ROWS, pa.int64()), pa.array(["etag"] * SHARD_ROWS)
    files = pa.table([paths, sizes, versions], schema=FILES)
    uris = [work / f"{shard:05}.parquet" for shard in range(shards)]
    for shard, uri in enumerate(uris):
        numbers = pa.array(np.full(SHARD_ROWS, shard, np.int32))
        uri.write_bytes(parquet_bytes(files.append_column("shard", numbers)))
    return [str(uri) for uri in uris]


def _build_dataset(uris: Sequence[str], gpus: int, jpeg_bytes: int, checkpoint: CheckpointFiles) -> ray.data.Dataset:
    """Build the dataset of `score.predict_rows`."""
    options = classify.ClassifyOptions(
        checkpoint=checkpoint,
        precision="auto",
        num_models=gpus,
        use_gpu=True,
        cpus=data.CpuAllocation(model=0.0001, decode=1.0001, num_decoders=NUM_DECODERS),
        batch_size=classify.default_batch_size(use_gpu=True, img_size=checkpoint.preprocessing.img_size),
        gpu_decodes=True,
    )
    stage = NullDecode(**vars(options.build_decode_stage(max_pixels=10**8)), jpeg_bytes=jpeg_bytes)
    ray.data.DataContext.get_current().wait_for_min_actors_s = START_S
    decoded = data.read_and_decode_manifests(dict.fromkeys(uris, SHARD_ROWS), stage, options.cpus.decode)
    with mock.patch.object(classify, "Classifier", NullClassifier):
        return classify.add_classifier(decoded, stage, options, PASSTHROUGH_COLUMNS)


def _run(dataset: ray.data.Dataset, gpus: int, jpeg_bytes: int, num_rows: int) -> Result:
    calls: list[int] = []
    rows, start = 0, (0, 0, time.perf_counter(), time.process_time())
    for block in classify.iter_predictions(dataset, "score"):
        rows += block.num_rows
        calls.append(int(block["model_s"][0].as_py()))
        if rows >= WARM_UP_SHARE * num_rows and not start[0]:
            start = (rows, len(calls), time.perf_counter(), time.process_time())
    assert rows == num_rows, f"{rows} rows instead of {num_rows}"
    seconds, cpu_s = time.perf_counter() - start[2], time.process_time() - start[3]
    rate, driver_ms = (rows - start[0]) / seconds, cpu_s * 1000 / (len(calls) - start[1])
    return Result(gpus, jpeg_bytes, rows, calls, round(rate), round(driver_ms, 1))


def check_null_pipeline(_: Path) -> Iterator[tuple[str, bool]]:
    """Measure FEW_GPUS and MANY_GPUS in a separate process."""
    command = [sys.executable, "-m", "benchmarks.scale.null_pipeline"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout.splitlines()
    lines = [line for line in printed if line.startswith(b"{")]  # without warnings of Ray
    assert len(lines) == len(MAX_DRIVER_MS), "a measurement failed, see above"
    for found in map(json.loads, lines):
        min_rate = f" (goal: at least {MIN_ROWS_PER_S:,.0f})" if found["gpus"] == MANY_GPUS else ""
        yield (
            f"The dataset of `score` with {found['gpus']} pretended GPUs: {found['rows_per_s']:,} rows/s{min_rate}, "
            f"{found['rows_per_call']:,.0f} rows a block (goal: at least {MIN_BLOCK_ROWS:,}), {found['driver_ms']} ms "
            f"of CPU time of the driver a block (goal: at most {MAX_DRIVER_MS[found['gpus']]:.0f}).",
            found["good"],
        )


def main() -> int:
    """Measure, and return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.null_pipeline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[FEW_GPUS, MANY_GPUS])
    parser.add_argument("--shards", type=int, default=100, help=f"of {SHARD_ROWS:,} rows")
    parser.add_argument("--jpeg-bytes", type=int, default=0, help=f"of each file; of photographs {JPEG_BYTES:,}")
    options = parser.parse_args()
    good = []
    for gpus in options.gpus:
        with tempfile.TemporaryDirectory(prefix="catsdogs-") as name:
            result = measure(gpus, options.shards, options.jpeg_bytes, Path(name))
        calls = result.rows_per_call
        line = asdict(result) | {"rows_per_call": float(np.median(calls)), "calls": len(calls), "good": result.is_good}
        print(json.dumps(line), flush=True)
        good.append(result.is_good)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
