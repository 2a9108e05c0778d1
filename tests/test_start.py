"""Ray starts while the module that needs it is imported."""

import subprocess
import sys

import pytest
import ray

from catsdogs.errors import RunError
from catsdogs.start import import_while_ray_starts, on_existing_cluster, start_ray

ALONE = """
import ray
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from catsdogs.start import import_while_ray_starts

print(*import_while_ray_starts("beside").SEEN, ray.get(ray.put("outlived the import")))
try:
    list_actors(ray.get_runtime_context().gcs_address)
except RayStateApiException:
    print("nobody waits for what is not there")
"""
BESIDE = """
import psutil
import ray

SEEN = [*sorted(process.name() for process in psutil.Process().children()), ray.is_initialized()]
"""


def test_ray_has_only_what_is_needed_and_outlives_the_import_beside_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "beside.py").write_text(BESIDE)
    words = [sys.executable, "-c", ALONE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert done.stdout == "gcs_server raylet False outlived the import\nnobody waits for what is not there\n"


def test_ray_that_runs_is_kept(ray_cluster):
    start_ray()
    node = ray.get_runtime_context().get_node_id()
    assert import_while_ray_starts("catsdogs.labels").__name__ == "catsdogs.labels"
    assert ray.get_runtime_context().get_node_id() == node


def test_the_errors_of_both_are_told(ray_cluster, monkeypatch):
    start_ray()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_while_ray_starts("catsdogs.no_such_module")
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(RunError, match="RAY_ADDRESS=nonsense"):
        import_while_ray_starts("catsdogs.labels")


@pytest.mark.parametrize(
    ("address", "joins"), [(None, False), ("", False), ("local", False), ("auto", True), ("127.0.0.1:6379", True)]
)
def test_an_address_other_than_local_is_a_clusters(monkeypatch, address, joins):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert on_existing_cluster() is joins
