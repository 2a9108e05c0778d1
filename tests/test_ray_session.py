"""The token and the folder of a Ray that this process starts."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from catsdogs import temporaries
from catsdogs.errors import RunError
from catsdogs.ray_session import MAX_PARENT_BYTES, remove_folders, session_environment

NAMES = ("RAY_TMPDIR", "RAY_AUTH_TOKEN")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    yield
    remove_folders()


def read_environment(with_token: bool = True) -> dict[str, str]:
    with session_environment(with_token):
        return dict(os.environ)


def test_only_this_user_can_enter_the_folder_and_it_is_removed(tmp_path):
    folder = Path(read_environment()["RAY_TMPDIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "ray" / "logs").mkdir(parents=True)
    (folder / "ray" / "logs" / "worker.out").write_text("a line")
    remove_folders()
    assert not folder.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_locked_is_removed(tmp_path, monkeypatch, error):
    def fail(descriptor):
        raise error

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(temporaries, "lock", fail)
    with pytest.raises((RunError, KeyboardInterrupt)):
        read_environment()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_ray_that_outlives_it_does_not_create_the_folder_again():
    program = "import os, time; print(flush=True); time.sleep(1); os.makedirs(os.environ['RAY_TMPDIR'])"
    with session_environment(with_token=True):
        folder = Path(os.environ["RAY_TMPDIR"])
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.read(1)
        remove_folders()
        assert not psutil.pid_exists(process.pid)
    assert not folder.exists()


def test_the_folder_of_a_killed_process_is_removed_with_its_processes_and_that_of_a_live_one_is_kept(tmp_path):
    program = (
        "import os, subprocess, sys; from catsdogs.ray_session import session_environment\n"
        "with session_environment(with_token=True):\n"
        "    orphan = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    print(os.environ['RAY_TMPDIR'], orphan.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as alive:
        folder, orphan = killed.stdout.readline().split()
        live_folder, other = alive.stdout.readline().split()
        killed.kill()
        killed.wait()
        read_environment()
        assert not Path(folder).exists()
        assert not psutil.pid_exists(int(orphan))
        assert Path(live_folder).exists()
        psutil.Process(int(other)).kill()
    read_environment()  # the second one has ended, too
    assert not Path(live_folder).exists()


def test_the_folder_is_kept_for_its_logs_if_verbose(monkeypatch):
    monkeypatch.setenv("CATSDOGS_LOG", "debug")
    folder = Path(read_environment()["RAY_TMPDIR"])
    remove_folders()
    monkeypatch.delenv("CATSDOGS_LOG")
    read_environment()  # a later command does not remove it
    folder.rmdir()


def test_the_processes_of_ray_inherit_a_token_that_this_process_does_not_keep(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of a cluster")
    tokens = {read_environment()["RAY_AUTH_TOKEN"] for _ in range(2)}
    assert len(tokens) == 1
    assert len(tokens.pop()) == 64
    assert read_environment(with_token=False)["RAY_AUTH_TOKEN"] == "of a cluster"
    assert [os.environ.get(name) for name in NAMES] == [None, "of a cluster"]


def test_the_folder_is_in_tmpdir_unless_its_path_is_too_long_for_sockets(monkeypatch, tmp_path):
    monkeypatch.chdir("/tmp")
    short = Path("/tmp") / f"{os.getpid()}"
    short.mkdir()
    long = tmp_path / ("x" * MAX_PARENT_BYTES)
    long.mkdir()
    try:
        for tmpdir, parent in (
            (short, short),
            (short.name, short),
            (long, short.parent),
            (short / "absent", short.parent),
        ):
            monkeypatch.setenv("TMPDIR", str(tmpdir))
            assert Path(read_environment()["RAY_TMPDIR"]).parent == parent
    finally:
        remove_folders()
        short.rmdir()


@pytest.mark.parametrize("reason", ["File name too long", "not ASCII", "No such file or directory", "Not a directory"])
def test_a_folder_of_the_user_that_cannot_be_used_is_one_line(monkeypatch, tmp_path, reason):
    chosen = {
        "File name too long": "/tmp/" + "x" * MAX_PARENT_BYTES,
        "not ASCII": "/tmp/é",
        "Not a directory": "/dev/null",
    }
    monkeypatch.setenv("RAY_TMPDIR", chosen.get(reason, "/tmp/absent"))
    with pytest.raises(
        RunError, match=rf"{reason}\): set RAY_TMPDIR to a writable folder .* at most \d+ bytes"
    ) as caught:
        read_environment()
    assert "\n" not in str(caught.value)
