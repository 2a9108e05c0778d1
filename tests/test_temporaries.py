"""Temporary files and folders of killed processes are removed, and those of live ones are not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from catsdogs import storage
from catsdogs.errors import RunError
from catsdogs.temporaries import MIN_AGE_S, temporary_folder

WRITER = """
import os, signal, sys
from catsdogs import storage
os.fsync = lambda descriptor: (print("writing", flush=True), sys.stdin.read())  # until it is killed
storage.write_bytes(sys.argv[1], b"1" * 1000)
"""
FOLDER = """
import sys
from pathlib import Path
from catsdogs.temporaries import temporary_folder
with temporary_folder("catsdogs-test-", Path(sys.argv[1])) as folder:
    (folder / "file").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start():
    processes = []

    def start_process(code, argument):
        command = [sys.executable, "-c", code, str(argument)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1], processes[-1].stdout.readline().strip()

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_file_of_a_killed_writer_is_removed_and_that_of_a_live_one_is_not(tmp_path, start):
    writer, _ = start(WRITER, tmp_path / "model")
    (name,) = os.listdir(tmp_path)
    assert storage.is_temporary(name)
    storage.remove_temporaries(str(tmp_path))
    assert os.listdir(tmp_path) == [name]
    kill(writer)
    assert os.listdir(tmp_path) == [name]
    storage.remove_temporaries(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_last_file_of_a_result_is_never_beside_those_of_another(tmp_path):
    folder = str(tmp_path / "out")
    storage.write_files(folder, {"table": b"1", "of one format": b"1", "record": b"1"})
    (tmp_path / "out" / ".table.0123456789abcdef.catsdogs").touch()  # of a killed process
    storage.write_files(folder, {"table": b"2", "record": b"2"}, obsolete=["of one format", "never there"])
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {"table": b"2", "record": b"2"}
    (tmp_path / "out" / "table").unlink()
    (tmp_path / "out" / "table").mkdir()  # cannot be written
    with pytest.raises(RunError, match="cannot write"):
        storage.write_files(folder, {"table": b"3", "record": b"3"})
    assert os.listdir(folder) == ["table"]


@pytest.mark.parametrize(
    "name", [".model.0123456789abcdef", ".x.catsdogs", "model.0123456789abcdef.catsdogs", ".model"]
)
def test_files_of_the_user_are_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    storage.remove_temporaries(str(tmp_path))
    assert os.listdir(tmp_path) == [name]


def test_a_link_with_the_name_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".model.0123456789abcdef.catsdogs").symlink_to(tmp_path / "mine")
    storage.remove_temporaries(str(tmp_path))
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(tmp_path, start):
    process, folder = start(FOLDER, tmp_path)
    old = time.time() - MIN_AGE_S - 1
    os.utime(folder, (old, old))
    with temporary_folder("catsdogs-test-", tmp_path):
        assert os.path.exists(f"{folder}/file")
    kill(process)
    with temporary_folder("catsdogs-test-", tmp_path) as own:
        assert os.listdir(tmp_path) == [own.name]
    assert os.listdir(tmp_path) == []
