"""One scoring of an output, without Ray: resumed, grown, retried, refused, proved."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring import (
    RUN_SETTINGS,
    Scorer,
    check_output,
    config_of,
    fill,
    part_paths,
    read_rows,
    scored,
    snapshot,
    summary_of,
)

from catsdogs import storage
from catsdogs.config import VerifyConfig
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Message
from catsdogs.score import lease as lease_module
from catsdogs.score import verify
from catsdogs.score.lease import Lease
from catsdogs.score.plan import Plan
from catsdogs.score.run import run

SEVEN = {name: name for name in "abcdefg"}


@pytest.fixture
def source(tmp_path):
    fill(tmp_path / "in", **SEVEN)
    return tmp_path / "in"


def test_every_file_is_one_row_of_a_part_of_its_shard(source, tmp_path):
    summary, read = scored(source, tmp_path / "out")
    assert summary["listed"] == summary["rows"] == summary["scored"] == len(read) == 7
    assert [part_paths(tmp_path / "out", shard) for shard in range(3)] == [
        ["a.jpg", "b.jpg", "c.jpg"],
        ["d.jpg", "e.jpg", "f.jpg"],
        ["g.jpg"],
    ]
    check_output(str(tmp_path / "out"), 7)
    assert set(summary["stage_seconds"]) == {"list", "read", "decode", "model", "write"}
    assert summary["limited_by"] in summary["stage_seconds"]


def test_the_same_command_after_success_reads_no_image_and_writes_nothing(source, tmp_path):
    first, _ = scored(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again, read = scored(source, tmp_path / "out")
    assert read == []
    assert again == first
    assert snapshot(tmp_path / "out") == before


class StoppedError(Exception):
    """Stands for whatever ends a labeller."""


class Failing(Scorer):
    """Fails after some rows of each call."""

    def __init__(self, num_rows):
        super().__init__()
        self._left = num_rows

    def __call__(self, uris):
        for i, rows in enumerate(super().__call__(uris)):
            if i * 2 >= self._left:
                raise StoppedError("node lost\nworker died")
            yield rows


def test_rounds_go_on_while_they_finish_parts(source, tmp_path):
    scorer, told = Failing(4), []
    summary = run(config_of(source, tmp_path / "out"), RUN_SETTINGS, scorer, told.append)
    assert summary["rows"] == 7
    check_output(str(tmp_path / "out"), 7)
    assert summary["scored"] == 7
    assert any("worker died: going on with 2 open parts" in event.text for event in told if isinstance(event, Message))


def test_rounds_that_finish_nothing_end_the_run_and_what_is_done_is_kept(source, tmp_path):
    with pytest.raises(RunError, match=r"3 times nothing was finished.*worker died.*same command goes on"):
        run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Failing(0), lambda _: None)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    _, read = scored(source, tmp_path / "out")
    assert len(read) == 7


class Dropping(Scorer):
    """Loses the rows of one file the first time."""

    dropped = False

    def __call__(self, uris):
        for rows in super().__call__(uris):
            keep = [not path.endswith("/e.jpg") or self.dropped for path in rows["path"].to_pylist()]
            self.dropped = self.dropped or not all(keep)
            yield rows.filter(pa.array(keep))


def test_rows_that_get_lost_on_the_way_are_labelled_again(source, tmp_path):
    scorer = Dropping()
    run(config_of(source, tmp_path / "out"), RUN_SETTINGS, scorer, lambda _: None)
    check_output(str(tmp_path / "out"), 7)
    assert len(scorer.paths) == 10  # its shard again, no other


def test_an_unfinished_run_goes_on_with_its_plan(source, tmp_path):
    scored(source, tmp_path / "out")
    whole = read_rows(str(tmp_path / "out"))
    for name in ("_SUCCESS", "part-00001.parquet"):
        (tmp_path / "out" / name).unlink()
    fill(source, bb="new")
    summary, read = scored(source, tmp_path / "out")
    assert [os.path.basename(path) for path in read] == ["d.jpg", "e.jpg", "f.jpg"]
    assert summary["scored"] == 3
    assert read_rows(str(tmp_path / "out")) == whole
    summary, read = scored(source, tmp_path / "out")  # now that it is finished, what has grown
    assert [os.path.basename(path) for path in read] == ["bb.jpg"]
    check_output(str(tmp_path / "out"), 8)


def test_new_files_go_to_new_parts_and_changed_ones_are_replaced_in_theirs(source, tmp_path):
    output = tmp_path / "out"
    scored(source, output)
    before = snapshot(output)
    fill(source, a0="new", z="new", e="changed")
    (source / "b.jpg").unlink()
    summary, read = scored(source, output)
    assert [os.path.basename(path) for path in read] == ["a0.jpg", "e.jpg", "z.jpg"]
    assert summary["listed"] == summary["rows"] == 9
    after = snapshot(output)
    for shard in (0, 2):  # parts without such a file
        assert after[str(output / f"part-{shard:05}.parquet")] == before[str(output / f"part-{shard:05}.parquet")]
    assert part_paths(output, 3) == ["a0.jpg", "z.jpg"]
    assert read_rows(str(output))[str(source / "e.jpg")]["size_bytes"] == len("changed")
    assert (
        pq.read_schema(output / "part-00001.parquet").metadata == pq.read_schema(output / "part-00000.parquet").metadata
    )
    check_output(str(output), 9)
    assert scored(source, output)[1] == []


def test_several_listings_stay_distinct_and_ordered(source, tmp_path):
    for i in range(4):
        fill(source, **{f"{letter}{i}": "x" for letter in "abcd"})
        scored(source, tmp_path / "out")
    check_output(str(tmp_path / "out"), 7 + 16)
    fill(source, a0="changed", g="changed", d3="changed")
    assert [os.path.basename(path) for path in scored(source, tmp_path / "out")[1]] == ["a0.jpg", "d3.jpg", "g.jpg"]
    check_output(str(tmp_path / "out"), 23)


def test_retry_failed_reads_failed_rows_only(source, tmp_path):
    output = tmp_path / "out"
    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{source}/{name}.jpg\n" for name in [*SEVEN, "gone", "late"]))
    summary, _ = scored(manifest, output)
    assert summary["by_status"] == {"not_found": 2, "ok": 7}
    before = snapshot(output)
    fill(source, late="here now")
    summary, read = scored(manifest, output, retry_failed=True)
    assert [os.path.basename(path) for path in read] == ["gone.jpg", "late.jpg"]
    assert summary["by_status"] == {"not_found": 1, "ok": 8}
    after = snapshot(output)
    assert after[str(output / "part-00000.parquet")] == before[str(output / "part-00000.parquet")]
    check_output(str(output), 9)
    assert scored(manifest, output)[1] == []


def test_a_retried_row_is_not_changed_for_the_next_listing(source, tmp_path):
    class Changing(Scorer):
        def __call__(self, uris):
            fill(source, c="replaced while it was scored")
            return super().__call__(uris)

    run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Changing(), lambda _: None)
    assert summary_of(tmp_path / "out")["by_status"] == {"changed": 1, "ok": 6}
    fill(source, new="not for a retry")
    _, read = scored(source, tmp_path / "out", retry_failed=True)
    assert [os.path.basename(path) for path in read] == ["c.jpg"]
    _, read = scored(source, tmp_path / "out")
    assert [os.path.basename(path) for path in read] == ["new.jpg"]


def test_a_row_that_fails_again_is_not_changed_for_the_next_listing(source, tmp_path):
    (source / "c.jpg").unlink()
    (source / "c.jpg").mkdir()  # listed as nothing, so by a manifest
    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{source}/{name}.jpg\n" for name in SEVEN))
    assert scored(manifest, tmp_path / "out")[0]["by_status"] == {"ok": 6, "read_error": 1}
    assert len(scored(manifest, tmp_path / "out", retry_failed=True)[1]) == 1
    assert scored(manifest, tmp_path / "out")[1] == []


def test_what_a_retry_could_not_read_keeps_its_listed_version(source, tmp_path):
    class Losing(Scorer):
        def __call__(self, uris):
            (source / "c.jpg").unlink(missing_ok=True)
            return super().__call__(uris)

    run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Losing(), lambda _: None)
    before = pq.read_table(tmp_path / "out" / "_manifest" / "part-00000.parquet")
    _, read = scored(source, tmp_path / "out", retry_failed=True)
    assert [os.path.basename(path) for path in read] == ["c.jpg"]
    assert pq.read_table(tmp_path / "out" / "_manifest" / "part-00000.parquet").equals(before)
    assert scored(source, tmp_path / "out")[1] == []


def test_a_vanished_folder_is_told_and_its_rows_stay(source, tmp_path):
    scored(source, tmp_path / "out")
    for path in source.iterdir():
        path.unlink()
    summary, read = scored(source, tmp_path / "out")
    assert (read, summary["rows"]) == ([], 7)


def test_limit_counts_the_first_files_by_path_also_after_growth(source, tmp_path):
    summary, _ = scored(source, tmp_path / "out", limit=4)
    assert summary["rows"] == 4
    fill(source, a1="new")
    _, read = scored(source, tmp_path / "out", limit=4)
    assert [os.path.basename(path) for path in read] == ["a1.jpg"]
    check_output(str(tmp_path / "out"), 5)


@pytest.mark.parametrize("settings", [{"model_sha256": "1" * 64}, {"class_names": ["a", "b", "c"]}, {"img_size": 64}])
def test_another_kind_of_scoring_is_refused_with_the_difference(settings, source, tmp_path):
    scored(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    other = dataclasses.replace(RUN_SETTINGS, settings=dict(RUN_SETTINGS.settings) | settings)
    with pytest.raises(InputError, match=f"another kind: {next(iter(settings))}: .* there, .* now"):
        scored(source, tmp_path / "out", other)
    assert snapshot(tmp_path / "out") == before


def test_no_resume_wants_an_empty_output(source, tmp_path):
    scored(source, tmp_path / "out", resume=False)
    with pytest.raises(InputError, match="--no-resume: expected an empty or new --output"):
        scored(source, tmp_path / "out", resume=False)


def test_settings_bind_nobody_before_there_is_a_plan(source, tmp_path):
    wrong = dataclasses.replace(RUN_SETTINGS, settings=dict(RUN_SETTINGS.settings) | {"input": "a typo"})
    with pytest.raises(InputError, match="no such file or folder"):
        scored(tmp_path / "typo", tmp_path / "out", wrong)
    assert scored(source, tmp_path / "out")[0]["rows"] == 7


def test_a_plan_that_somebody_else_wrote_is_not_replaced(source, tmp_path):
    plan = Plan(str(tmp_path / "out"), [3], [0], listing_cursor=None)
    plan.save()
    plan.save()
    Plan.load(str(tmp_path / "out")).save()
    with pytest.raises(RunError, match="was written by somebody else"):
        plan.save()
    with pytest.raises(RunError, match="was written by somebody else"):
        Plan(str(tmp_path / "out")).save()


def test_what_a_limited_listing_could_not_list_is_told(source, tmp_path, monkeypatch):
    real = os.scandir

    def scandir(folder):
        if folder == os.fsencode(source / "0refused"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    (source / "0refused").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    summary, _ = scored(source, tmp_path / "out", limit=2)
    assert summary["unlisted"] == {str(source / "0refused"): "Permission denied"}


def test_a_folder_of_others_is_refused_untouched(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        scored(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_nothing_to_score_is_an_error_now_and_later(tmp_path):
    (tmp_path / "in").mkdir()
    for _ in range(2):
        with pytest.raises(InputError, match="no images under"):
            scored(tmp_path / "in", tmp_path / "out")
    fill(tmp_path / "in", a="a")
    assert scored(tmp_path / "in", tmp_path / "out")[0]["rows"] == 1


def test_an_interrupted_listing_goes_on_where_it_was(source, tmp_path, monkeypatch):
    class Interrupted(BaseException):
        pass

    real = storage.Listing
    asked = []

    class Listing(real):
        def __iter__(self):
            asked.append(self.start_after)
            for i, entry in enumerate(super().__iter__()):
                if len(asked) < 3 and i == 3:
                    raise Interrupted
                yield entry

    monkeypatch.setattr(storage, "Listing", Listing)
    for _ in range(2):
        with pytest.raises(Interrupted):
            scored(source, tmp_path / "out")
    assert scored(source, tmp_path / "out")[0]["rows"] == 7
    assert [os.path.basename(path) for path in asked] == ["", "c.jpg", "f.jpg"]
    check_output(str(tmp_path / "out"), 7)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_manifests_name_every_entry_once_whatever_its_extension(kind, source, tmp_path):
    (source / "x.bin").write_text("x")
    (source / "a,b.jpg").write_text("b")
    paths = [str(source / name) for name in ("x.bin", "a,b.jpg", "x.bin")]
    manifest = tmp_path / f"manifest.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"path": paths, "other": [1, 2, 3]}), manifest)
    elif kind == "csv":
        manifest.write_text("other,path\n" + "".join(f'1,"{path}"\n' for path in paths))
    else:
        manifest.write_text("\n".join(paths) + "\n")
    scored(manifest, tmp_path / "out")
    assert part_paths(tmp_path / "out", 0) == ["a,b.jpg", "x.bin"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_manifest_in_order_and_one_out_of_order_are_one_plan(reverse, source, tmp_path):
    (source / "é x.jpg").write_text("x")
    paths = sorted((str(path) for path in source.iterdir()), reverse=reverse)
    (tmp_path / "m.txt").write_text("\r\n".join([*paths, ""]))
    scored(tmp_path / "m.txt", tmp_path / "out")
    found = [part_paths(tmp_path / "out", shard) for shard in range(3)]
    assert found == [["a.jpg", "b.jpg", "c.jpg"], ["d.jpg", "e.jpg", "f.jpg"], ["g.jpg", "é x.jpg"]]


def test_a_manifest_without_its_column_is_an_error_that_says_so(tmp_path):
    (tmp_path / "m.csv").write_text("file\nx.jpg\n")
    with pytest.raises(InputError, match="column named path"):
        scored(tmp_path / "m.csv", tmp_path / "out")


def test_a_full_disk_ends_the_run_leaves_nothing_partial_and_room_lets_it_go_on(source, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Filling(Scorer):
        def __call__(self, uris):
            for i, rows in enumerate(super().__call__(uris)):
                if i == 3:
                    monkeypatch.setattr(os, "fsync", full)
                yield rows

    with pytest.raises(RunError, match=r"cannot write .*: No space left on device"):
        run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Filling(), lambda _: None)
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [name for name in names if name.startswith(".")] == []
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000.parquet"]
    monkeypatch.undo()
    assert len(scored(source, tmp_path / "out")[1]) == 4
    check_output(str(tmp_path / "out"), 7)


# The proof


def damage_rows(output):
    table = pq.read_table(output / "part-00001.parquet")
    pq.write_table(table.slice(1), output / "part-00001.parquet")


def double_row(output):
    table = pq.read_table(output / "part-00001.parquet")
    pq.write_table(
        pa.concat_tables([table.slice(0, 1), table.slice(0, 1), table.slice(2)]), output / "part-00001.parquet"
    )


DAMAGES = {
    "a part is missing": (lambda out: (out / "part-00001.parquet").unlink(), "1 parts are missing, part-00001.parquet"),
    "a row is missing": (damage_rows, "part-00001.parquet: expected 3 rows, found 2"),
    "a row is there twice": (double_row, "part-00001.parquet: its rows are not the files of its plan"),
    "a part of others": (
        lambda out: pq.write_table(pa.table({}), out / "part-00009.parquet"),
        "part-00009.parquet: no part",
    ),
    "half a part": (
        lambda out: (out / "part-00000.parquet").write_bytes((out / "part-00000.parquet").read_bytes()[:300]),
        "part-00000.parquet: expected a finished part",
    ),
    "no record": (lambda out: (out / "_stats" / "part-00002.json").unlink(), "record of part-00002.parquet"),
    "no success": (lambda out: (out / "_SUCCESS").unlink(), "no _SUCCESS"),
    "a wrong summary": (lambda out: (out / "_summary.json").write_text('{"listed": 8}'), "expected listed 7, found 8"),
    "an open redo": (lambda out: fill_redo(out), "wait to be labelled again"),
}


def fill_redo(output):
    (output / "_manifest" / "_redo").mkdir()
    (output / "_manifest" / "_redo" / "part-00000.parquet").write_bytes(
        (output / "_manifest" / "part-00000.parquet").read_bytes()
    )


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_what_is_wrong(name, source, tmp_path):
    scored(source, tmp_path / "out")
    assert verify(VerifyConfig(output=str(tmp_path / "out")))["rows"] == 7
    damage, message = DAMAGES[name]
    damage(tmp_path / "out")
    with pytest.raises(RunError, match=message):
        verify(VerifyConfig(output=str(tmp_path / "out")))


def test_verify_wants_a_scoring(tmp_path):
    with pytest.raises(InputError, match=r"found no _run.json"):
        verify(VerifyConfig(output=str(tmp_path)))


def test_a_path_in_two_listings_is_found(source, tmp_path):
    scored(source, tmp_path / "out")
    fill(source, h="h")
    scored(source, tmp_path / "out")
    for folder in ("", "_manifest"):
        path = tmp_path / "out" / folder / "part-00003.parquet"
        table = pq.read_table(path)
        column = pa.array([str(source / "b.jpg")])
        pq.write_table(table.set_column(0, table.schema.field("path"), column), path)
    with pytest.raises(RunError, match=r"b\.jpg' is listed twice"):
        verify(VerifyConfig(output=str(tmp_path / "out")))


# The lease


def test_a_second_driver_is_refused_while_the_first_lives(source, tmp_path):
    refused = pytest.raises(InputError, match=rf"another scoring \(process {os.getpid()} on .*\) is writing there")
    with Lease(str(tmp_path / "out"), lambda _: None), refused:
        scored(source, tmp_path / "out")
    assert scored(source, tmp_path / "out")[0]["rows"] == 7


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_lease(output, **changes):
    lease = Lease(str(output), lambda _: None)
    record = json.loads(lease._content()) | changes
    output.mkdir()
    (output / "_lease.json").write_text(json.dumps(record))


def test_a_dead_drivers_lease_is_taken_over_at_once(source, tmp_path):
    write_lease(tmp_path / "out", pid=dead_process(), process_started="1", token="dead")
    began = time.monotonic()
    scored(source, tmp_path / "out")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "out" / "_lease.json").exists()


def test_another_machines_lease_is_waited_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_S", 1.0)
    monkeypatch.setattr(lease_module, "POLL_S", 0.1)
    write_lease(tmp_path / "out", host="elsewhere", token="other")
    told = []
    run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Scorer(), told.append)
    assert "on elsewhere) held" in told[0].text
    assert "waiting up to 1 s" in told[0].text


def test_another_machines_living_lease_refuses(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_S", 20.0)
    monkeypatch.setattr(lease_module, "POLL_S", 0.05)
    write_lease(tmp_path / "out", host="elsewhere", token="other")
    renewal = threading.Timer(0.3, lambda: (tmp_path / "out" / "_lease.json").write_text('{"host": "elsewhere"}'))
    renewal.start()
    with pytest.raises(InputError, match=r"another scoring .* is writing there"):
        scored(source, tmp_path / "out")
    renewal.join()


def test_a_driver_that_lost_its_lease_commits_nothing_more(source, tmp_path):
    class Overtaken(Scorer):
        def __call__(self, uris):
            for i, rows in enumerate(super().__call__(uris)):
                if i == 3:
                    lease = json.loads((tmp_path / "out" / "_lease.json").read_text())
                    (tmp_path / "out" / "_lease.json").write_text(json.dumps(lease | {"token": "another"}))
                yield rows

    with pytest.raises(RunError, match="another scoring has taken over; this scoring stops"):
        run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Overtaken(), lambda _: None)
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000.parquet"]
    assert json.loads((tmp_path / "out" / "_lease.json").read_text())["token"] == "another"


def test_a_part_that_somebody_else_wrote_is_never_replaced(source, tmp_path):
    class Raced(Scorer):
        def __call__(self, uris):
            for rows in super().__call__(uris):
                (tmp_path / "out" / "part-00001.parquet").write_bytes(b"another driver's")
                yield rows

    with pytest.raises(RunError, match=r"part-00001.parquet was written or removed by somebody else"):
        run(config_of(source, tmp_path / "out"), RUN_SETTINGS, Raced(), lambda _: None)
    assert (tmp_path / "out" / "part-00001.parquet").read_bytes() == b"another driver's"


def test_a_living_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    with Lease(str(tmp_path), lambda _: None) as lease:
        first = (tmp_path / "_lease.json").read_text()
        deadline = time.monotonic() + 10
        while (tmp_path / "_lease.json").read_text() == first and time.monotonic() < deadline:
            time.sleep(0.02)
        lease.check()
        assert (tmp_path / "_lease.json").read_text() != first
    assert not (tmp_path / "_lease.json").exists()


# The same on a bucket


def test_a_bucket_resumes_grows_and_is_proved(bucket, put):
    for name in "abcdefg":
        put(f"in/{name}.jpg", name.encode())
    source, output = f"s3://{bucket}/in", f"s3://{bucket}/out"
    assert scored(source, output)[0]["rows"] == 7
    assert scored(source, output)[1] == []
    put("in/e.jpg", b"changed")
    put("in/h.jpg", b"new")
    assert [path.rpartition("/")[2] for path in scored(source, output)[1]] == ["e.jpg", "h.jpg"]
    check_output(output, 8)
    storage.remove(f"{output}/part-00000.parquet")
    assert [path.rpartition("/")[2] for path in scored(source, output)[1]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert Plan.load(output).listing_first_shards == [0, 3]
