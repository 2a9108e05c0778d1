"""Metrics in Ray, scraped over HTTP as Prometheus does."""

import re
import time
import urllib.request

import pyarrow as pa
import pytest
import ray
from scoring import ByteClassifier, run_scoring, write_images

from catsdogs import ray_metrics, start
from catsdogs.config import TrainConfig
from catsdogs.progress import silent
from catsdogs.train.events import EpochFinished, ProgressReporter
from catsdogs.train.run_folder import History

EPOCH = {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.75, "val_loss": 0.25, "lr": 0.001, "images_per_s": 80.0}


class Unlucky(ByteClassifier):
    """Finds that a file is gone, and repeats each request twice."""

    def __init__(self, gone):
        super().__init__()
        self._gone = gone

    def __call__(self, shards):
        self._gone.unlink()
        for rows in super().__call__(shards):
            retries = pa.array([2] * rows.num_rows, pa.int32())
            yield rows.set_column(rows.schema.get_field_index("retries"), "retries", retries)


class NoTracker:
    def log_epoch(self, row):
        """Log nothing."""


def finish_epoch(run):
    reporter = ProgressReporter(TrainConfig(data_dir="data", name=run), silent, NoTracker())
    reporter.on_event(EpochFinished(History([{"seconds": 1.0, "val_accuracy": 0.5} | EPOCH]), 1))


def scrape(until):
    """Scrape the node until it exports a name; return the values by name and labels of ours."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = ""
    while until not in text:  # a process reports each 10 s
        time.sleep(0.5)
        text = urllib.request.urlopen(url, timeout=30).read().decode()
    found = re.findall(r"^ray_catsdogs_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {(name, *re.findall(r'(?:status|run)="(.*?)"', labels)): float(value) for name, labels, value in found}


def test_a_cluster_exports_the_rows_of_score_and_the_epochs_of_train(ray_cluster, tmp_path):
    start.start_ray()
    write_images(tmp_path / "in", a="a", b="b", gone="c")
    run_scoring(tmp_path / "in", tmp_path / "out", classifier=Unlucky(tmp_path / "in" / "gone.jpg"))
    finish_epoch("first")
    values = scrape(until="ray_catsdogs_train_loss")
    assert values["score_rows_total", "ok"] == 2
    assert values["score_rows_total", "not_found"] == 1
    assert values["score_retries_total",] == 6
    assert {key[0]: value for key, value in values.items() if key[1:] == ("first",)} == {
        f"train_{name.removeprefix('train_')}": value for name, value in EPOCH.items()
    } | {"train_seconds": 1.0, "train_val_accuracy": 0.5}


def test_nothing_is_recorded_on_a_ray_that_the_command_started(ray_cluster, monkeypatch):
    start.start_ray()
    monkeypatch.setattr(start, "on_existing_cluster", lambda: False)
    for name in ("Counter", "Gauge"):
        monkeypatch.setattr(ray_metrics, name, lambda *_: pytest.fail("recorded"))
    ray_metrics.count_scored_rows({"ok": 1}, num_retries=1)
    finish_epoch("first")
