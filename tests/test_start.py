"""Ray starts while the module that needs it is imported."""

import subprocess
import sys

import pytest
import ray

from catsdogs.errors import RunError
from catsdogs.start import import_beside_ray, start_ray

ALONE = """
import ray
from catsdogs.start import import_beside_ray

print(*import_beside_ray("servers").NAMES, ray.get(ray.put("outlived the import")))
"""
SERVERS = """
import psutil

NAMES = sorted(process.name() for process in psutil.Process().children())
"""


def test_ray_outlives_the_import_that_follows_its_servers_the_needed_two(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "servers.py").write_text(SERVERS)
    words = [sys.executable, "-c", ALONE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert done.stdout == "gcs_server raylet outlived the import\n"


def test_ray_that_runs_is_kept(ray_cluster):
    start_ray()
    node = ray.get_runtime_context().get_node_id()
    assert import_beside_ray("catsdogs.labels").__name__ == "catsdogs.labels"
    assert ray.get_runtime_context().get_node_id() == node


def test_the_errors_of_both_are_told(ray_cluster, monkeypatch):
    start_ray()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_beside_ray("catsdogs.no_such_module")
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(RunError, match="RAY_ADDRESS=nonsense"):
        import_beside_ray("catsdogs.labels")
