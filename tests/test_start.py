"""Start Ray or join a cluster; import a module meanwhile."""

import contextlib
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import ray
from conftest import LOOPBACK

import catsdogs
from catsdogs import start
from catsdogs.errors import InputError, RunError
from catsdogs.start import import_while_ray_starts, on_existing_cluster, start_ray


def test_ray_of_this_process_is_not_an_existing_cluster(own_ray):
    assert not own_ray["existing"]
    assert own_ray["existing_after_the_shutdown"]


def test_ray_outlives_the_import_and_keeps_the_handler_of_sigterm(own_ray):
    assert own_ray["outlives_the_import"]
    assert own_ray["keeps_the_handler_of_sigterm"]


def test_a_worker_of_an_own_ray_imports_this_package_whatever_the_current_folder_contains(own_ray):
    assert own_ray["package_of_a_worker"] == catsdogs.__file__


def test_an_own_ray_has_a_token_a_private_folder_and_loopback_without_a_home_and_with_a_long_tmpdir(own_ray):
    assert own_ray["has_token"]
    assert set(own_ray["listens_on"]) <= LOOPBACK
    assert own_ray["mode_of_the_folder"] == "0o700"
    assert own_ray["parent_of_the_folder"] == "/tmp"
    assert not own_ray["folder_after_the_shutdown"]


@pytest.mark.parametrize("deleted", [False, True])
def test_the_current_folder_is_not_on_the_import_path_of_workers_on_a_cluster(
    ray_cluster, tmp_path, monkeypatch, deleted
):
    ray.shutdown()
    (tmp_path / "catsdogs").mkdir()
    monkeypatch.chdir(tmp_path)
    if deleted:
        shutil.rmtree(tmp_path)
    start_ray()
    assert str(tmp_path) not in ray.get(ray.remote(lambda: sys.path).remote())
    with pytest.raises(FileNotFoundError) if deleted else contextlib.nullcontext():
        assert os.getcwd() == str(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup.\nMore."),
        OSError("no space left"),
        ray.exceptions.RaySystemError("lost"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line_and_leaves_no_folder(monkeypatch, error):
    folders = []

    def init(*_, **__):
        folders.append(Path(os.environ["RAY_TMPDIR"]))
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(start.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(start.ray, "init", init)
    monkeypatch.setattr(start.ray, "shutdown", lambda: None)
    with pytest.raises(RunError, match=r"Ray did not start on this machine \(.*\): wait until") as caught:
        start_ray()
    assert "\n" not in str(caught.value)
    assert [folder.exists() for folder in folders] == [False] * 2


def test_an_argument_that_is_not_utf_8_is_refused_before_ray_starts(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "catsdogs", os.fsdecode(b"--input=caf\xe9")])
    monkeypatch.setattr(start.ray, "is_initialized", lambda: False)
    with pytest.raises(InputError, match="--input=caf\udce9: expected UTF-8, Ray does not start with such an argument"):
        start_ray()


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(start.ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match=f"Connection refused: expected a running cluster at RAY_ADDRESS={address}"):
        start_ray()


def test_ray_that_the_caller_initialized_is_an_existing_cluster(ray_cluster, monkeypatch):
    ray.shutdown()
    address = os.environ["RAY_ADDRESS"]
    monkeypatch.delenv("RAY_ADDRESS")  # as in a notebook, whose environment says nothing
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    start_ray()
    assert on_existing_cluster()
    ray.shutdown()


def test_a_cluster_that_was_joined_is_an_existing_one(ray_cluster):
    start_ray()
    assert on_existing_cluster()


def test_ray_that_runs_is_kept(ray_cluster):
    start_ray()
    node = ray.get_runtime_context().get_node_id()
    assert import_while_ray_starts("catsdogs.labels").__name__ == "catsdogs.labels"
    assert ray.get_runtime_context().get_node_id() == node


def test_errors_of_the_import_and_of_the_start_are_raised(ray_cluster, monkeypatch):
    start_ray()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_while_ray_starts("catsdogs.no_such_module")
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(RunError, match="RAY_ADDRESS=nonsense"):
        import_while_ray_starts("catsdogs.labels")


def test_ctrl_c_while_ray_starts_does_not_wait_for_an_import_without_limit(monkeypatch, tmp_path):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(start, "MAX_IMPORT_S", 0.2)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "start_ray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_while_ray_starts("endless")


class _Terminated(BaseException):
    pass


def test_sigterm_while_ray_starts_reaches_the_callers_handler(monkeypatch):
    def init(*_, **__):  # as ray.init does it
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    def terminate(*_):
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    monkeypatch.setattr(start.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(start.ray, "init", init)
    monkeypatch.setattr(start.ray, "shutdown", lambda: None)
    try:
        with pytest.raises(_Terminated):
            start_ray()
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("address", "joined"), [(None, False), ("", False), ("local", False), ("auto", True)])
def test_ray_address_decides_what_is_joined(monkeypatch, address, joined):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    asked = []

    def init(address, **_):
        asked.append(address)
        raise ConnectionError("stop here")

    monkeypatch.setattr(start.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(start.ray, "init", init)
    monkeypatch.setattr(start.ray, "shutdown", lambda: None)
    expected = "expected a running cluster at RAY_ADDRESS=auto" if joined else "Ray did not start on this machine"
    with pytest.raises(RunError, match=f"{expected}"):
        start_ray()
    assert asked == ["auto"] if joined else ["local", "local"]
