"""What is recorded of a command. tests/test_jobs.py scrapes it over HTTP."""

import pyarrow as pa
import pytest

from catsdogs import ray_metrics, start

ROWS = pa.table({"status": ["ok", "ok", "empty"], "retries": pa.array([0, 2, 1], pa.int32())})


@pytest.fixture
def recorded(ray_cluster, monkeypatch):
    """Return what counters and gauges get, by name and tags."""
    start.start_ray()
    values = {}

    class Metric:
        def __init__(self, name, _description, tag_keys):
            self.name, self.tag_keys = name, tag_keys

        def inc(self, value, tags):
            assert tuple(tags) == self.tag_keys
            values[self.name, *tags.values()] = value

        set = inc

    for name in ("Counter", "Gauge"):
        monkeypatch.setattr(ray_metrics, name, Metric)
    return values


def test_rows_count_by_status_and_retries_in_all(recorded):
    ray_metrics.count_scored_rows("out", ROWS)
    assert recorded == {
        ("catsdogs_score_rows", "out", "ok"): 2,
        ("catsdogs_score_rows", "out", "empty"): 1,
        ("catsdogs_score_retries", "out"): 3,
    }


def test_nothing_is_recorded_on_a_ray_that_the_command_started(recorded, monkeypatch):
    monkeypatch.setattr(start, "on_existing_cluster", lambda: False)
    ray_metrics.count_scored_rows("out", ROWS)
    ray_metrics.set_epoch("first", {"epoch": 1})
    assert recorded == {}
