"""What Ray makes of our errors and of a machine's CPUs."""

import subprocess
import sys

import pytest
import ray.data
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
from ray.data._internal.execution.operators import actor_pool_map_operator as pool
from ray.data._internal.utils import cached_ray_internals

from catsdogs import data
from catsdogs.data import runtime
from catsdogs.errors import RunError
from catsdogs.start import start_ray


def test_our_error_comes_back_out_of_a_task(ray_cluster):
    start_ray()
    data.configure_ray_data()

    def raise_ours(_):
        raise RunError("the S3 credentials are expired: renew them")

    with pytest.raises(Exception, match="expired") as caught:
        ray.data.range(1).map_batches(raise_ours).materialize()
    explained = data.to_run_error(caught.value, "scoring", "2 finished parts are kept")
    assert type(explained) is RunError
    assert str(explained) == "the S3 credentials are expired: renew them; 2 finished parts are kept"


def test_other_errors_keep_their_last_line():
    assert str(data.to_run_error(AssertionError(), "scoring", "kept")) == "scoring failed: AssertionError; kept"


@pytest.mark.parametrize("joined", [False, True], ids=["own Ray", "a cluster"])
def test_only_a_cluster_has_the_actors_that_serve_one(ray_cluster, monkeypatch, joined):
    start_ray()
    if not joined:
        monkeypatch.delenv("RAY_ADDRESS")
    asked = []
    for module, name in (
        (stats, "get_or_create_stats_actor"),
        (coordinator, "get_or_create_autoscaling_coordinator"),
        (pool, "get_or_create_actor_location_tracker"),
        (cached_ray_internals, "get_or_create_actor_location_tracker"),
    ):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda name=name, made=made: asked.append(name) or made())

    class Successor:  # in an actor
        def __call__(self, rows):
            return {"id": rows["id"] + 1}

    with data.without_cluster_actors():
        rows = ray.data.range(100, override_num_blocks=2).map_batches(Successor, concurrency=1).take_all()

    assert sorted(row["id"] for row in rows) == list(range(1, 101))
    assert len(set(asked)) == (3 if joined else 0)


@pytest.mark.parametrize("nodes", [[1], [2], [2, 2], [1, 1], [0, 8], [16]])
@pytest.mark.parametrize("num_models", [1, 2, 4, 8, 64])
def test_a_decoding_task_fits_beside_the_models_of_every_machine(monkeypatch, nodes, num_models):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": n} if n else {}} for n in nodes])
    share = runtime.allocate_cpus(num_models)
    with_cpus = [n for n in nodes if n]
    here = -(-num_models // len(with_cpus))
    assert share.model > 0
    assert share.model != share.decode
    assert here * share.model + share.decode <= min(with_cpus)


@pytest.mark.parametrize(("use_gpu", "expected"), [("auto", False), ("false", False)])
def test_without_gpus_auto_takes_the_cpu(monkeypatch, use_gpu, expected):
    monkeypatch.setattr(ray, "cluster_resources", dict)
    assert runtime.resolve_use_gpu(use_gpu, 1) is expected


PREPARED = """
import time
from contextlib import suppress
from pathlib import Path

import psutil

from catsdogs import data
from catsdogs.start import start_ray

def holds_torchvision(process):
    with suppress(OSError):  # it has ended
        return "torchvision" in Path(f"/proc/{process.pid}/maps").read_text()

start_ray()
data.warm_up_decoder(1.0)
while not any(map(holds_torchvision, psutil.Process().children(recursive=True))):
    time.sleep(0.2)
print("prepared")
"""


def test_a_process_is_prepared_to_decode(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = [sys.executable, "-c", PREPARED]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert done.stdout == "prepared\n"
