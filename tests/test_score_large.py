"""Scoring runs of many shards: the plan is saved now and then, parts are committed concurrently."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from scoring import ByteClassifier, check_output, part_names, read_rows, run_scoring, write_images

from catsdogs import storage
from catsdogs.errors import RunError
from catsdogs.score import threads
from catsdogs.score.plan import Plan

NUM_FILES = 240
TIMEOUT_S = 30.0  # of a barrier that is never reached if calls run one after the other


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "in", **{name: name for name in "abcdefg"})
    return tmp_path / "in"


# The plan


def test_a_large_plan_is_saved_when_one_percent_of_it_is_new(tmp_path, monkeypatch):
    saved_sizes = []
    save = Plan.save
    monkeypatch.setattr(Plan, "save", lambda plan: saved_sizes.append(len(plan.sizes)) or save(plan))
    write_images(tmp_path / "in", **{f"{i:03}": "x" for i in range(NUM_FILES)})
    run_scoring(tmp_path / "in", tmp_path / "out", shard_size=1)
    assert saved_sizes == [*range(1, 101), *range(102, 201, 2), *range(203, 240, 3), 240]


KILLED = """
import os, sys
from scoring import run_scoring
from catsdogs import storage

def write_over(uri, *content, write=storage.write_over):
    written = write(uri, *content)
    if uri.endswith(sys.argv[3]):
        os._exit(9)
    return written

storage.write_over = write_over
run_scoring(sys.argv[1], sys.argv[2], shard_size=1)
"""


def kill_while_planning(source: Path, output: Path, shard: int) -> int:
    """Run a driver until it has written the manifest of a shard; return how many manifests are not in the plan."""
    command = [sys.executable, "-c", KILLED, str(source), str(output), f"_manifest/part-{shard:05}.parquet"]
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    return len(list((output / "_manifest").glob("part-*"))) - len(Plan.load(str(output)).sizes)


def check_resume(source: Path, output: Path, num_files: int) -> None:
    """Resume, and compare with the output of an undisturbed run."""
    run_scoring(source, output, shard_size=1)
    check_output(str(output), num_files)
    run_scoring(source, output.with_name("fresh"), shard_size=1)
    assert read_rows(str(output)) == read_rows(str(output.with_name("fresh")))


def test_a_driver_that_is_killed_between_two_saves_loses_and_doubles_nothing(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write_images(source, **{f"{i:03}": f"{i}" for i in range(NUM_FILES)})
    assert kill_while_planning(source, output, 238) == 3
    (source / "238.jpg").unlink()  # the manifest that lists it is overwritten
    check_resume(source, output, NUM_FILES - 1)


def test_a_driver_that_is_killed_while_it_lists_again_loses_and_doubles_nothing(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    names = [f"{i:03}" for i in range(NUM_FILES // 2)]
    write_images(source, **{name: f"{name} before" for name in names})
    run_scoring(source, output, shard_size=1)
    write_images(source, **{name: f"changed {name}" for name in names})
    write_images(source, **{f"{name}-new": name for name in names})
    assert kill_while_planning(source, output, 230) > 0
    (source / "110-new.jpg").unlink()
    check_resume(source, output, NUM_FILES - 1)


# Commits


def patch_part_creation(monkeypatch, before):
    """Call a function before each part is created."""
    create_bytes = storage.create_bytes

    def create(uri, content):
        if "/part-" in uri:
            before(uri)
        return create_bytes(uri, content)

    monkeypatch.setattr(storage, "create_bytes", create)


def test_parts_are_committed_concurrently(source, tmp_path, monkeypatch):
    barrier = threading.Barrier(3, timeout=TIMEOUT_S)
    patch_part_creation(monkeypatch, lambda _: barrier.wait())
    assert run_scoring(source, tmp_path / "out")[0]["rows"] == 7
    check_output(str(tmp_path / "out"), 7)


@pytest.mark.parametrize(("limit", "value", "expected"), [("MAX_WRITES", 2, 2), ("MAX_WRITE_BYTES", 1, 1)])
def test_only_a_few_parts_wait_to_be_committed(limit, value, expected, source, tmp_path, monkeypatch):
    running, most = threading.Semaphore(expected), []

    def enter(_):
        most.append(running.acquire(blocking=False))
        time.sleep(0.02)
        running.release()

    monkeypatch.setattr(threads, limit, value)
    patch_part_creation(monkeypatch, enter)
    run_scoring(source, tmp_path / "out", shard_size=1)
    assert most == [True] * 7
    check_output(str(tmp_path / "out"), 7)


def test_the_commits_that_run_at_ctrl_c_end_before_the_lease_is_returned(source, tmp_path, monkeypatch):
    class Interrupted(ByteClassifier):
        def __call__(self, manifest_uris):
            yield from super().__call__(manifest_uris)
            started.wait(TIMEOUT_S)
            raise KeyboardInterrupt

    def commit_slowly(uri):
        if uri.endswith("part-00002.parquet"):
            started.set()
            time.sleep(0.5)
            leases.append((tmp_path / "out" / "_lease.json").exists())

    started, leases = threading.Event(), []
    patch_part_creation(monkeypatch, commit_slowly)
    with pytest.raises(KeyboardInterrupt):
        run_scoring(source, tmp_path / "out", classifier=Interrupted())
    assert leases == [True]
    assert part_names(tmp_path / "out", 2) == ["g.jpg"]
    assert not (tmp_path / "out" / "_lease.json").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write")]


def test_an_attempt_ends_when_its_commits_have_ended(source, tmp_path, monkeypatch):
    """Else a part that is being committed would be scored again, and its second commit would be refused."""

    class Dropping(ByteClassifier):
        num_calls = 0

        def __call__(self, manifest_uris):
            self.num_calls += 1
            for rows in super().__call__(manifest_uris):
                if self.num_calls > 1 or not rows["path"][0].as_py().endswith("a.jpg"):
                    yield rows

    patch_part_creation(monkeypatch, lambda _: time.sleep(0.2))
    classifier = Dropping()
    run_scoring(source, tmp_path / "out", classifier=classifier)
    assert classifier.num_calls == 2
    assert len(classifier.paths) == 7 + 3
    check_output(str(tmp_path / "out"), 7)


def test_the_error_of_a_commit_ends_the_run_and_parts_that_were_committed_are_kept(source, tmp_path, monkeypatch):
    def refuse(uri):
        if uri.endswith("part-00001.parquet"):
            raise RunError("the store refuses it")

    with monkeypatch.context() as patch:
        patch_part_creation(patch, refuse)
        with pytest.raises(RunError, match=r"the store refuses it; finished parts are kept"):
            run_scoring(source, tmp_path / "out")
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    run_scoring(source, tmp_path / "out")
    check_output(str(tmp_path / "out"), 7)


def test_requests_to_score_rows_again_are_read_and_committed_concurrently(source, tmp_path, monkeypatch):
    run_scoring(source, tmp_path / "out")
    write_images(source, a="changed", d="changed", g="changed")
    read_bytes, barrier = storage.read_bytes, threading.Barrier(3, timeout=TIMEOUT_S)

    def read(uri):
        if "/_redo/" in uri and threading.current_thread() is not threading.main_thread():
            barrier.wait()
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    assert run_scoring(source, tmp_path / "out")[1] == ["a.jpg", "d.jpg", "g.jpg"]
    check_output(str(tmp_path / "out"), 7)
