"""Scoring runs of many shards: the plan is saved now and then, parts are committed and checked concurrently."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from forked import Forked
from ray.util.state import list_tasks
from scoring import ByteClassifier, check_output, part_names, read_rows, run_scoring, write_images

from catsdogs import storage
from catsdogs.config import VerifyConfig
from catsdogs.errors import RunError
from catsdogs.progress import StageProgress
from catsdogs.score import audit, listing_checks, threads, verify
from catsdogs.score.plan import Plan
from catsdogs.start import start_ray
from catsdogs.storage import retrying

NUM_FILES = 240
TIMEOUT_S = 30.0  # of a driver, or of a barrier that is never reached if calls run one after the other


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
    with Forked(KILLED, str(source), str(output), f"_manifest/part-{shard:05}.parquet") as driver:
        assert driver.wait(TIMEOUT_S).returncode == 9
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
    assert 1 <= kill_while_planning(source, output, 238) <= 3  # of 236 to 238, written concurrently
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
        def __call__(self, shards):
            yield from super().__call__(shards)
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


def test_an_interrupted_command_does_not_wait_for_a_store_that_is_gone(monkeypatch):
    errors, started = [], threading.Event()

    async def fail():
        started.set()
        raise TimeoutError

    def write():
        try:
            asyncio.run(retrying.with_retries(fail, fail))
        except Exception as error:
            errors.append(type(error))
            raise

    def interrupt_a_write():
        with threads.WritePool() as pool:
            pool.submit(0, write)
            started.wait(TIMEOUT_S)
            raise KeyboardInterrupt

    monkeypatch.setattr(threads, "GRACE_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        interrupt_a_write()
    assert errors == [TimeoutError]  # not the error of a store that was waited for
    with storage.limit_retries(60):
        pass
    results = iter([TimeoutError, TimeoutError, None])

    async def recover():
        if error := next(results):
            raise error

    assert asyncio.run(retrying.with_retries(recover, recover)) == (None, 2)


def test_an_attempt_ends_when_its_commits_have_ended(source, tmp_path, monkeypatch):
    """Else a part that is being committed would be scored again, and its second commit would be refused."""

    class Dropping(ByteClassifier):
        num_calls = 0

        def __call__(self, shards):
            self.num_calls += 1
            for rows in super().__call__(shards):
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


# The audit


@pytest.fixture(params=[1, 2, 32], ids=lambda size: f"range of {size}")
def _range_size(request, monkeypatch):
    """Check ranges of so many shards; the first difference must not depend on it."""
    monkeypatch.setattr(audit, "SHARDS_PER_RANGE", request.param)


def copy_shard(output: Path, shard: int, target: int) -> None:
    """Replace the files of a shard by those of another one."""
    for folder in (output, output / "_manifest"):
        (folder / f"part-{target:05}.parquet").write_bytes((folder / f"part-{shard:05}.parquet").read_bytes())


def lose_row(output: Path, shard: int) -> None:
    path = output / f"part-{shard:05}.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


@pytest.mark.usefixtures("_range_size")
def test_the_first_difference_is_reported(source, tmp_path):
    output = tmp_path / "out"
    run_scoring(source, output, shard_size=1)
    lose_row(output, 5)
    (output / "part-00006.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"part-00005.parquet: expected 1 rows, found 0"):
        verify(VerifyConfig(output=str(output)))
    copy_shard(output, 1, 3)
    with pytest.raises(RunError, match=r"_manifest/part-00003.parquet: expected ascending paths, each once"):
        verify(VerifyConfig(output=str(output)))
    lose_row(output, 2)
    with pytest.raises(RunError, match=r"part-00002.parquet: expected 1 rows, found 0"):
        verify(VerifyConfig(output=str(output)))


@pytest.mark.usefixtures("_range_size")
def test_every_record_and_failed_row_is_found(tmp_path):
    names = [f"{name}.jpg" for name in "abcdefg"]
    (tmp_path / "m.txt").write_text("".join(f"{tmp_path}/in/{name}\n" for name in names))
    write_images(tmp_path / "in", b="b", e="e")
    run_scoring(tmp_path / "m.txt", tmp_path / "out", shard_size=1)
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "_stats" / "part-00004.json").unlink()
    (tmp_path / "out" / "_stats" / "part-00006.json").write_text("{}")
    events = []
    summary, read = run_scoring(tmp_path / "m.txt", tmp_path / "out", progress=events.append, shard_size=1)
    assert (summary["by_status"], read) == ({"not_found": 5, "ok": 2}, [])
    page = (tmp_path / "out" / "_report.html").read_text()
    shown = [page.index(f"in/{name}") for name in names if f"in/{name}" in page]
    assert (len(shown), shown) == (5, sorted(shown))
    done = [event.done for event in events if isinstance(event, StageProgress) and event.stage == "check"]
    assert (done, done[-1]) == (sorted(done), 7)
    check_output(str(tmp_path / "out"), 7)  # with all records


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("name", [b"d", b"d\xe9"], ids=["text", "bytes"])
def test_a_path_in_two_of_several_listings_is_found(size, name, tmp_path, monkeypatch):
    monkeypatch.setattr(listing_checks, "SHARDS_PER_INTERVAL", size)
    source, output = tmp_path / "in", tmp_path / "out"
    for names in (["b", os.fsdecode(name), "f", "h"], ["a", "c", "e", "g"], ["ba", "e5", "g5", "z"]):
        write_images(source, **dict.fromkeys(names, "x"))
        run_scoring(source, output, shard_size=1)
    check_output(str(output), 12)
    copy_shard(output, 8, 10)  # in the third listing it is `ba`, out of order
    with pytest.raises(RunError, match=r"part-00010.parquet: expected ascending paths"):
        verify(VerifyConfig(output=str(output)))
    copy_shard(output, 3, 10)  # `h`, which is in the first listing, too
    copy_shard(output, 1, 5)
    expected = "d%E9" if name != b"d" else "d"
    with pytest.raises(RunError, match=rf"_manifest: '.*/in/{expected}\.jpg' is listed twice"):
        verify(VerifyConfig(output=str(output)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_large_plan_is_checked_by_ray_tasks(source, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "SHARDS_PER_RANGE", 2)
    run_scoring(source, tmp_path / "threads", shard_size=1)
    start_ray()
    before = count_range_checks()
    monkeypatch.setattr(audit, "MIN_SHARDS_FOR_TASKS", 7)
    run_scoring(source, tmp_path / "tasks", shard_size=1)
    check_output(str(tmp_path / "tasks"), 7)
    names = ["listed", "rows", "by_status", "by_label", "unlisted"]
    summaries = [json.loads((tmp_path / name / "_summary.json").read_text()) for name in ("threads", "tasks")]
    assert len({json.dumps([summary[name] for name in names]) for summary in summaries}) == 1
    lose_row(tmp_path / "tasks", 3)
    (tmp_path / "tasks" / "_SUCCESS").unlink()
    with pytest.raises(RunError, match=r"part-00003.parquet: expected 1 rows, found 0; remove it; finished parts"):
        run_scoring(source, tmp_path / "tasks", shard_size=1)
    deadline = time.monotonic() + 30  # a process of Ray reports its tasks once a second
    while count_range_checks() - before < 4:
        assert time.monotonic() < deadline, "no tasks checked the parts"
        time.sleep(0.1)


def count_range_checks() -> int:
    return len(list_tasks(filters=[("name", "=", "check range")], limit=10_000))
