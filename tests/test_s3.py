"""Training and evaluation from a bucket into a bucket equal those from the disk."""

import csv
import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catsdogs import storage
from catsdogs.config import EvaluateConfig
from catsdogs.evaluate import evaluate
from catsdogs.train import train


def read_csv(content):
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_a_run_in_a_bucket_equals_one_on_the_disk(finished_run, red_blue_root, bucket, put, tmp_path):
    for path in sorted(red_blue_root.rglob("*.jpg")):
        put(f"a data+set/{path.relative_to(red_blue_root)}", path.read_bytes())
    data_dir, runs = f"s3://{bucket}/a data+set", f"s3://{bucket}/runs"
    result = train(dataclasses.replace(finished_run.config, data_dir=data_dir, storage_path=runs))
    local = read_csv((finished_run.folder / "summary.csv").read_bytes())
    remote = read_csv(storage.read_bytes(f"{runs}/run/summary.csv"))
    for here, there in zip(local, remote, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert float(there[name]) == pytest.approx(float(here[name]), rel=1e-6), name
    config = EvaluateConfig(
        data_dir=data_dir, checkpoint=f"{runs}/run/best", output=f"s3://{bucket}/evaluation", precision="fp32"
    )
    metrics = evaluate(config)
    assert metrics["accuracy"] == result.val_accuracy
    assert json.loads(storage.read_bytes(f"s3://{bucket}/evaluation/metrics.json")) == metrics
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(f"s3://{bucket}/evaluation/predictions.parquet")))
    kept = pq.read_table(finished_run.folder / "val_predictions.parquet")
    assert rows.drop_columns(["path"]).equals(kept.drop_columns(["path"]))
