"""Scoring runs without Ray: resume, new and changed files, retries, refusals, audit, lease."""

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import NodeDiedError, RayTaskError
from scoring import (
    RUN_SETTINGS,
    ByteClassifier,
    build_config,
    check_output,
    part_names,
    read_rows,
    read_summary,
    run_scoring,
    snapshot,
    wait_for_commit,
    write_images,
)

from catsdogs import environment, storage
from catsdogs import lease as lease_module
from catsdogs.config import VerifyConfig
from catsdogs.errors import InputError, RunError
from catsdogs.lease import Lease
from catsdogs.progress import Message, StageProgress, silent
from catsdogs.score import verify
from catsdogs.score.plan import Plan
from catsdogs.score.run_files import record_environment, restore_precision

SEVEN = {name: name for name in "abcdefg"}


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "in", **SEVEN)
    return tmp_path / "in"


def test_every_file_is_one_row_of_a_part_of_its_shard(source, tmp_path):
    summary, read = run_scoring(source, tmp_path / "out")
    assert summary["listed"] == summary["rows"] == summary["scored"] == len(read) == 7
    assert [part_names(tmp_path / "out", shard) for shard in range(3)] == [
        ["a.jpg", "b.jpg", "c.jpg"],
        ["d.jpg", "e.jpg", "f.jpg"],
        ["g.jpg"],
    ]
    check_output(str(tmp_path / "out"), 7)
    assert set(summary["stage_seconds"]) == {"list", "read", "decode", "model", "write"}
    assert summary["limited_by"] in summary["stage_seconds"]


def test_the_same_command_after_success_reads_no_image_and_writes_nothing(source, tmp_path):
    first, _ = run_scoring(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again, read = run_scoring(source, tmp_path / "out")
    assert read == []
    assert again == first
    assert snapshot(tmp_path / "out") == before


class Failing(ByteClassifier):
    """Raises an error after some rows of each call, as a lost machine makes Ray do."""

    def __init__(self, num_rows, error=None):
        super().__init__()
        self._num_rows = num_rows
        self._error = error or NodeDiedError("node lost\nworker died")

    def __call__(self, shards):
        for i, rows in enumerate(super().__call__(shards)):
            if i * 2 >= self._num_rows:
                raise self._error
            yield rows


def test_after_a_failure_of_ray_the_pending_parts_are_scored(source, tmp_path, caplog):
    caplog.set_level("DEBUG", "catsdogs")
    events = []
    summary, _ = run_scoring(source, tmp_path / "out", classifier=Failing(4), progress=events.append)
    assert summary["rows"] == summary["scored"] == 7
    check_output(str(tmp_path / "out"), 7)
    lines = [event.text for event in events if isinstance(event, Message)]
    assert any("worker died: trying again, 2 parts are pending" in line for line in lines)
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert logged == [NodeDiedError, NodeDiedError]


def test_attempts_that_finish_no_part_end_the_run_and_finished_parts_are_kept(source, tmp_path):
    with pytest.raises(RunError, match=r"3 attempts in a row finished no part.*worker died.*run the same command"):
        run_scoring(source, tmp_path / "out", classifier=Failing(0))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    _, read = run_scoring(source, tmp_path / "out")
    assert len(read) == 7


@pytest.mark.parametrize("wrap", [lambda bug: bug, lambda bug: RayTaskError("decode", "in a task", bug)])
def test_a_bug_ends_the_run_at_once_and_finished_parts_are_kept(wrap, source, tmp_path):
    classifier = Failing(4, wrap(NameError("name 'imagee' is not defined")))
    with pytest.raises(NameError, match="imagee") as caught:
        run_scoring(source, tmp_path / "out", classifier=classifier)
    assert "finished parts are kept" in caught.value.__notes__[-1]
    assert "run the same command to resume" in caught.value.__notes__[-1]
    assert caught.value.__cause__ is None  # its own traceback is the only one
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000.parquet"]
    assert len(classifier.paths) <= 6  # two rows, and two more, of one attempt
    assert run_scoring(source, tmp_path / "out")[1] == ["d.jpg", "e.jpg", "f.jpg", "g.jpg"]
    check_output(str(tmp_path / "out"), 7)


def test_an_error_of_the_callers_progress_is_no_failure_of_ray(source, tmp_path):
    def progress(event):
        if isinstance(event, StageProgress) and event.stage == "score":
            raise OSError(5, "Input/output error")

    classifier = ByteClassifier()
    with pytest.raises(OSError, match="Input/output error"):
        run_scoring(source, tmp_path / "out", classifier=classifier, progress=progress)
    assert len(classifier.paths) == 2  # one attempt
    run_scoring(source, tmp_path / "out")
    check_output(str(tmp_path / "out"), 7)


class Dropping(ByteClassifier):
    """Drops the row of one file the first time."""

    dropped = False

    def __call__(self, shards):
        for rows in super().__call__(shards):
            keep = [not path.endswith("/e.jpg") or self.dropped for path in rows["path"].to_pylist()]
            self.dropped = self.dropped or not all(keep)
            yield rows.filter(pa.array(keep))


def test_a_shard_with_lost_rows_is_scored_again(source, tmp_path):
    _, read = run_scoring(source, tmp_path / "out", classifier=Dropping())
    check_output(str(tmp_path / "out"), 7)
    assert len(read) == 10  # its three files twice


def test_an_unfinished_run_resumes_with_its_plan(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    whole = read_rows(str(tmp_path / "out"))
    for name in ("_SUCCESS", "part-00001.parquet"):
        (tmp_path / "out" / name).unlink()
    write_images(source, bb="new")
    summary, read = run_scoring(source, tmp_path / "out")
    assert read == ["d.jpg", "e.jpg", "f.jpg"]
    assert summary["scored"] == 3
    assert read_rows(str(tmp_path / "out")) == whole
    summary, read = run_scoring(source, tmp_path / "out")  # once it is finished, new files are listed
    assert read == ["bb.jpg"]
    check_output(str(tmp_path / "out"), 8)


def test_new_files_get_new_parts_and_rows_of_changed_files_are_replaced(source, tmp_path):
    output = tmp_path / "out"
    run_scoring(source, output)
    before = snapshot(output)
    write_images(source, a0="new", z="new", e="changed")
    (source / "b.jpg").unlink()
    summary, read = run_scoring(source, output)
    assert read == ["a0.jpg", "e.jpg", "z.jpg"]
    assert summary["listed"] == summary["rows"] == 9
    after = snapshot(output)
    for shard in (0, 2):  # parts without such a file
        assert after[str(output / f"part-{shard:05}.parquet")] == before[str(output / f"part-{shard:05}.parquet")]
    assert part_names(output, 3) == ["a0.jpg", "z.jpg"]
    assert read_rows(str(output))[str(source / "e.jpg")]["size_bytes"] == len("changed")
    assert (
        pq.read_schema(output / "part-00001.parquet").metadata == pq.read_schema(output / "part-00000.parquet").metadata
    )
    check_output(str(output), 9)
    assert run_scoring(source, output)[1] == []


def test_several_listings_are_distinct_and_ordered(source, tmp_path):
    for i in range(4):
        write_images(source, **{f"{letter}{i}": "x" for letter in "abcd"})
        run_scoring(source, tmp_path / "out")
    check_output(str(tmp_path / "out"), 7 + 16)
    write_images(source, a0="changed", g="changed", d3="changed")
    assert run_scoring(source, tmp_path / "out")[1] == ["a0.jpg", "d3.jpg", "g.jpg"]
    check_output(str(tmp_path / "out"), 23)


def test_retry_failed_reads_failed_rows_only(source, tmp_path):
    output = tmp_path / "out"
    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{source}/{name}.jpg\n" for name in [*SEVEN, "gone", "late"]))
    summary, _ = run_scoring(manifest, output)
    assert summary["by_status"] == {"not_found": 2, "ok": 7}
    before = snapshot(output)
    write_images(source, late="here now")
    summary, read = run_scoring(manifest, output, retry_failed=True)
    assert read == ["gone.jpg", "late.jpg"]
    assert summary["by_status"] == {"not_found": 1, "ok": 8}
    after = snapshot(output)
    assert after[str(output / "part-00000.parquet")] == before[str(output / "part-00000.parquet")]
    check_output(str(output), 9)
    assert run_scoring(manifest, output)[1] == []


def test_a_retried_file_does_not_count_as_changed_in_the_next_listing(source, tmp_path):
    class Changing(ByteClassifier):
        def __call__(self, shards):
            write_images(source, c="replaced while it was scored")
            return super().__call__(shards)

    run_scoring(source, tmp_path / "out", classifier=Changing())
    assert read_summary(tmp_path / "out")["by_status"] == {"changed": 1, "ok": 6}
    write_images(source, new="not for a retry")
    _, read = run_scoring(source, tmp_path / "out", retry_failed=True)
    assert read == ["c.jpg"]
    _, read = run_scoring(source, tmp_path / "out")
    assert read == ["new.jpg"]


def test_a_file_that_fails_again_does_not_count_as_changed_in_the_next_listing(source, tmp_path):
    (source / "c.jpg").unlink()
    (source / "c.jpg").mkdir()  # a folder is listed by a manifest only
    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{source}/{name}.jpg\n" for name in SEVEN))
    assert run_scoring(manifest, tmp_path / "out")[0]["by_status"] == {"ok": 6, "read_error": 1}
    assert len(run_scoring(manifest, tmp_path / "out", retry_failed=True)[1]) == 1
    assert run_scoring(manifest, tmp_path / "out")[1] == []


def test_a_file_that_a_retry_cannot_read_keeps_its_listed_version(source, tmp_path):
    class Losing(ByteClassifier):
        def __call__(self, shards):
            (source / "c.jpg").unlink(missing_ok=True)
            return super().__call__(shards)

    run_scoring(source, tmp_path / "out", classifier=Losing())
    before = pq.read_table(tmp_path / "out" / "_manifest" / "part-00000.parquet")
    _, read = run_scoring(source, tmp_path / "out", retry_failed=True)
    assert read == ["c.jpg"]
    assert pq.read_table(tmp_path / "out" / "_manifest" / "part-00000.parquet").equals(before)
    assert run_scoring(source, tmp_path / "out")[1] == []


def test_rows_of_removed_files_stay(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    for path in source.iterdir():
        path.unlink()
    summary, read = run_scoring(source, tmp_path / "out")
    assert (read, summary["rows"]) == ([], 7)


def test_limit_counts_the_first_files_by_path_also_after_growth(source, tmp_path):
    summary, _ = run_scoring(source, tmp_path / "out", limit=4)
    assert summary["rows"] == 4
    write_images(source, a1="new")
    _, read = run_scoring(source, tmp_path / "out", limit=4)
    assert read == ["a1.jpg"]
    check_output(str(tmp_path / "out"), 5)


@pytest.mark.parametrize("settings", [{"model_sha256": "1" * 64}, {"class_names": ["a", "b", "c"]}, {"img_size": 64}])
def test_other_settings_than_those_of_the_output_are_refused_with_the_difference(settings, source, tmp_path):
    run_scoring(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    other = dataclasses.replace(RUN_SETTINGS, settings=dict(RUN_SETTINGS.settings) | settings)
    with pytest.raises(InputError, match=f"another scoring run: {next(iter(settings))}: .* there, .* now"):
        run_scoring(source, tmp_path / "out", other)
    assert snapshot(tmp_path / "out") == before


def test_no_resume_expects_an_empty_output(source, tmp_path):
    run_scoring(source, tmp_path / "out", resume=False)
    with pytest.raises(InputError, match="--no-resume: expected an empty or new --output"):
        run_scoring(source, tmp_path / "out", resume=False)


def test_settings_may_change_while_there_is_no_plan(source, tmp_path):
    wrong = dataclasses.replace(RUN_SETTINGS, settings=dict(RUN_SETTINGS.settings) | {"input": "a typo"})
    with pytest.raises(InputError, match="no such file or folder"):
        run_scoring(tmp_path / "typo", tmp_path / "out", wrong)
    assert run_scoring(source, tmp_path / "out")[0]["rows"] == 7


def test_the_stored_plan_keeps_its_names_and_an_older_one_is_read(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    path = tmp_path / "out" / "_manifest" / "_plan.json"
    record = json.loads(path.read_text())
    assert set(record) == {"sizes", "generations", "unlisted", "listed_to", "relisting", "other_files"}
    del record["other_files"]
    path.write_text(json.dumps(record))
    plan = Plan.load(str(tmp_path / "out"))
    assert (plan.sizes, plan.listing_first_shards, plan.listing_cursor) == ([3, 3, 1], [0], None)
    assert verify(VerifyConfig(output=str(tmp_path / "out")))["rows"] == 7


def test_a_plan_that_another_process_wrote_is_not_replaced(source, tmp_path):
    plan = Plan(str(tmp_path / "out"), [3], [0], listing_cursor=None)
    plan.save()
    plan.save()
    Plan.load(str(tmp_path / "out")).save()
    with pytest.raises(RunError, match="was written by another process"):
        plan.save()
    with pytest.raises(RunError, match="was written by another process"):
        Plan(str(tmp_path / "out")).save()


def test_other_files_are_counted_in_the_summary(source, tmp_path):
    for name in ("a.MOV", "b.mov", "readme", "f.txt", ".hidden.txt"):
        (source / name).write_text("no image")
    summary, _ = run_scoring(source, tmp_path / "out")
    assert summary["other_files"] == {"": 1, ".mov": 2, ".txt": 1}
    assert json.loads((tmp_path / "out" / "_summary.json").read_text())["other_files"] == summary["other_files"]


def test_an_input_of_other_files_is_an_error_that_counts_them(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("1.mov", "2.mov", "3.MOV", "notes.txt"):
        (tmp_path / "in" / name).write_text("no image")
    with pytest.raises(InputError, match=r"no images under .*: looked at 4 files, 0 images: 3 \.mov, 1 \.txt; "):
        run_scoring(tmp_path / "in", tmp_path / "out")


def test_a_limited_listing_reports_what_it_could_not_list(source, tmp_path, monkeypatch):
    real = os.scandir

    def scandir(folder):
        if folder == os.fsencode(source / "0refused"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    (source / "0refused").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    summary, _ = run_scoring(source, tmp_path / "out", limit=2)
    assert summary["unlisted"] == {str(source / "0refused"): "Permission denied"}


def test_an_output_with_foreign_files_is_refused_and_unchanged(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        run_scoring(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_input_without_images_is_an_error_at_each_run(tmp_path):
    (tmp_path / "in").mkdir()
    for _ in range(2):
        with pytest.raises(InputError, match="no images under"):
            run_scoring(tmp_path / "in", tmp_path / "out")
    write_images(tmp_path / "in", a="a")
    assert run_scoring(tmp_path / "in", tmp_path / "out")[0]["rows"] == 1


def test_an_interrupted_listing_resumes_at_its_last_shard(source, tmp_path, monkeypatch):
    class Interrupted(BaseException):
        pass

    for name in ("a0", "e0", "z"):
        (source / f"{name}.txt").write_text("no image")
    real = storage.Listing
    cursors = []

    class Listing(real):
        def __iter__(self):
            cursors.append(self.start_after)
            for i, entry in enumerate(super().__iter__()):
                if len(cursors) < 3 and i == 3:
                    raise Interrupted
                yield entry

    monkeypatch.setattr(storage, "Listing", Listing)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run_scoring(source, tmp_path / "out")
    summary, _ = run_scoring(source, tmp_path / "out")
    assert summary["rows"] == 7
    assert summary["other_files"] == {".txt": 3}
    assert [os.path.basename(path) for path in cursors] == ["", "c.jpg", "f.jpg"]
    check_output(str(tmp_path / "out"), 7)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_every_entry_of_a_path_list_is_scored_once_whatever_its_extension(kind, source, tmp_path):
    (source / "x.bin").write_text("x")
    (source / "a,b.jpg").write_text("b")
    paths = [str(source / name) for name in ("x.bin", "a,b.jpg", "x.bin")]
    path_list = tmp_path / f"paths.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"path": paths, "other": [1, 2, 3]}), path_list)
    elif kind == "csv":
        path_list.write_text("other,path\n" + "".join(f'1,"{path}"\n' for path in paths))
    else:
        path_list.write_text("\n".join(paths) + "\n")
    run_scoring(path_list, tmp_path / "out")
    assert part_names(tmp_path / "out", 0) == ["a,b.jpg", "x.bin"]


@pytest.mark.parametrize("reverse", [False, True])
def test_an_unordered_path_list_gives_the_plan_of_an_ordered_one(reverse, source, tmp_path):
    (source / "é x.jpg").write_text("x")
    paths = sorted((str(path) for path in source.iterdir()), reverse=reverse)
    (tmp_path / "m.txt").write_text("\r\n".join([*paths, ""]))
    run_scoring(tmp_path / "m.txt", tmp_path / "out")
    found = [part_names(tmp_path / "out", shard) for shard in range(3)]
    assert found == [["a.jpg", "b.jpg", "c.jpg"], ["d.jpg", "e.jpg", "f.jpg"], ["g.jpg", "é x.jpg"]]


def test_a_path_list_without_a_path_column_is_an_error(tmp_path):
    (tmp_path / "m.csv").write_text("file\nx.jpg\n")
    with pytest.raises(InputError, match=r"column named path .*there is none"):
        run_scoring(tmp_path / "m.csv", tmp_path / "out")


def test_an_empty_path_list_is_an_error(tmp_path):
    (tmp_path / "m.txt").write_text("\n")
    with pytest.raises(InputError, match="the path list is empty"):
        run_scoring(tmp_path / "m.txt", tmp_path / "out")


def test_a_full_disk_ends_the_run_without_partial_files_and_a_later_run_resumes(source, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FillingDisk(ByteClassifier):
        def __call__(self, shards):
            for i, rows in enumerate(super().__call__(shards)):
                if i == 3:
                    wait_for_commit(tmp_path / "out", 0)
                    monkeypatch.setattr(os, "fsync", full)
                yield rows

    with pytest.raises(RunError, match=r"cannot write .*: No space left on device"):
        run_scoring(source, tmp_path / "out", classifier=FillingDisk())
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [name for name in names if name.startswith(".")] == []
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000.parquet"]
    monkeypatch.undo()
    assert len(run_scoring(source, tmp_path / "out")[1]) == 4
    check_output(str(tmp_path / "out"), 7)


# Audit


def damage_rows(output):
    table = pq.read_table(output / "part-00001.parquet")
    pq.write_table(table.slice(1), output / "part-00001.parquet")


def double_row(output):
    table = pq.read_table(output / "part-00001.parquet")
    pq.write_table(
        pa.concat_tables([table.slice(0, 1), table.slice(0, 1), table.slice(2)]), output / "part-00001.parquet"
    )


DAMAGES = {
    "a part is missing": (
        lambda out: (out / "part-00001.parquet").unlink(),
        "1 of 3 parts are missing, part-00001.parquet",
    ),
    "a row is missing": (damage_rows, "part-00001.parquet: expected 3 rows, found 2"),
    "a row is doubled": (double_row, "part-00001.parquet: its rows are not the files of its plan"),
    "a foreign part": (
        lambda out: pq.write_table(pa.table({}), out / "part-00009.parquet"),
        "part-00009.parquet: no part",
    ),
    "half a part": (
        lambda out: (out / "part-00000.parquet").write_bytes((out / "part-00000.parquet").read_bytes()[:300]),
        "part-00000.parquet: expected a finished part",
    ),
    "a folder in place of a list": (
        lambda out: replace_by_folder(out),
        "_manifest/part-00000.parquet: .* cannot be read",
    ),
    "no record": (lambda out: (out / "_stats" / "part-00002.json").unlink(), "record of part-00002.parquet"),
    "no success": (lambda out: (out / "_SUCCESS").unlink(), "no _SUCCESS"),
    "half a summary": (lambda out: (out / "_summary.json").write_text('{"lis'), "expected a record of catsdogs"),
    "no summary": (lambda out: (out / "_summary.json").unlink(), "cannot read .*_summary.json"),
    "a wrong summary": (lambda out: (out / "_summary.json").write_text('{"listed": 8}'), "expected listed 7, found 8"),
    "a pending rescore": (lambda out: request_rescore(out), "are to be scored again"),
}


def replace_by_folder(output):
    (output / "_manifest" / "part-00000.parquet").unlink()
    (output / "_manifest" / "part-00000.parquet").mkdir()


def request_rescore(output):
    (output / "_manifest" / "_redo").mkdir()
    (output / "_manifest" / "_redo" / "part-00000.parquet").write_bytes(
        (output / "_manifest" / "part-00000.parquet").read_bytes()
    )


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_reports_damage(name, source, tmp_path):
    run_scoring(source, tmp_path / "out")
    assert verify(VerifyConfig(output=str(tmp_path / "out")))["rows"] == 7
    damage, message = DAMAGES[name]
    damage(tmp_path / "out")
    with pytest.raises(RunError, match=message):
        verify(VerifyConfig(output=str(tmp_path / "out")))


def rewrite_part(output, change):
    path = output / "part-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize("column", ["path", "status", "prob", "probs", "true_label"])
def test_verify_reports_a_part_without_a_column(source, tmp_path, column):
    run_scoring(source, tmp_path / "out")
    rewrite_part(tmp_path / "out", lambda table: table.drop_columns([column]))
    with pytest.raises(RunError, match=r"part-00001.parquet: expected .*; remove it; remove _SUCCESS there"):
        verify(VerifyConfig(output=str(tmp_path / "out")))


def test_verify_reports_a_manifest_without_paths(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    path = tmp_path / "out" / "_manifest" / "part-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["path"]), path)
    with pytest.raises(RunError, match=r"_manifest/part-00001.parquet: expected the column path"):
        verify(VerifyConfig(output=str(tmp_path / "out")))


def test_verify_reports_a_part_of_another_model(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    other = {"catsdogs.model_sha256": "1" * 64}
    rewrite_part(tmp_path / "out", lambda table: table.replace_schema_metadata(other))
    with pytest.raises(RunError, match=r"part-00001.parquet: expected rows of the model 0000.*1111.*; remove it"):
        verify(VerifyConfig(output=str(tmp_path / "out")))


def test_verify_accepts_parts_and_runs_that_do_not_say_their_model(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    rewrite_part(tmp_path / "out", lambda table: table.replace_schema_metadata(None))
    check_output(str(tmp_path / "out"), 7)
    (tmp_path / "out" / "_run.json").write_text('{"class_names": ["a", "b"]}')
    check_output(str(tmp_path / "out"), 7)


@pytest.mark.parametrize("content", ["{}", '{"class_names": 5}', '{"class_names": [5]}'])
def test_verify_expects_class_names(source, tmp_path, content):
    run_scoring(source, tmp_path / "out")
    (tmp_path / "out" / "_run.json").write_text(content)
    with pytest.raises(InputError, match=r"_run.json: expected a record of catsdogs with class_names"):
        verify(VerifyConfig(output=str(tmp_path / "out")))


DEEP = "[" * 200_000
PLAN = {"sizes": [3, 3, 1], "generations": [0], "unlisted": {}, "listed_to": None}


@pytest.mark.parametrize("name", ["_run.json", "_manifest/_plan.json", "_summary.json", "_stats/part-00000.json"])
@pytest.mark.parametrize("content", [DEEP, "[]", '[["class_names", ["a"]]]', "5", "null"], ids=["deep", *"lpin"])
def test_a_record_of_another_type_is_an_error(source, tmp_path, name, content):
    run_scoring(source, tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(
        (InputError, RunError), match=r"expected a record of catsdogs|record of part-00000.* is missing"
    ):
        verify(VerifyConfig(output=str(tmp_path / "out")))


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": None},
        {"sizes": ["3"]},
        {"sizes": [-3]},
        {"generations": []},
        {"generations": "x"},
        {"generations": [3, 0]},
        {"unlisted": 5},
        {"listed_to": 5},
        {"relisting": 5},
        {"other_files": [5]},
    ],
    ids=str,
)
def test_a_plan_with_a_value_of_another_type_is_an_error(source, tmp_path, change):
    run_scoring(source, tmp_path / "out")
    (tmp_path / "out" / "_manifest" / "_plan.json").write_text(json.dumps(PLAN))
    check_output(str(tmp_path / "out"), 7)
    (tmp_path / "out" / "_manifest" / "_plan.json").write_text(json.dumps(PLAN | change))
    with pytest.raises(InputError, match=r"_plan.json: expected a plan of catsdogs"):
        run_scoring(source, tmp_path / "out")


@pytest.mark.parametrize("content", [DEEP, '{"by_status": 5}'], ids=["deep", "number"])
def test_retry_failed_ignores_a_damaged_record(source, tmp_path, content):
    run_scoring(source, tmp_path / "out")
    record = tmp_path / "out" / "_stats" / "part-00000.json"
    record.write_text(content if content == DEEP else json.dumps(json.loads(record.read_text()) | {"by_status": 5}))
    assert run_scoring(source, tmp_path / "out", retry_failed=True)[0]["rows"] == 7


def test_what_verify_advises_repairs_the_output(source, tmp_path):
    output = tmp_path / "out"
    run_scoring(source, output)
    whole = read_rows(str(output))
    (output / "_stats" / "part-00002.json").unlink()
    (output / "_summary.json").write_text('{"lis')
    (output / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"part-00000.parquet: .*; remove it; remove _SUCCESS there"):
        verify(VerifyConfig(output=str(output)))
    (output / "part-00000.parquet").unlink()
    (output / "_SUCCESS").unlink()
    run_scoring(source, output)
    check_output(str(output), 7)
    assert read_rows(str(output)) == whole


def test_verify_expects_the_output_of_a_run(tmp_path):
    with pytest.raises(InputError, match=r"found no _run.json"):
        verify(VerifyConfig(output=str(tmp_path)))


def test_verify_reports_a_path_in_two_listings(source, tmp_path):
    run_scoring(source, tmp_path / "out")
    write_images(source, h="h")
    run_scoring(source, tmp_path / "out")
    for folder in ("", "_manifest"):
        path = tmp_path / "out" / folder / "part-00003.parquet"
        table = pq.read_table(path)
        column = pa.array([str(source / "b.jpg")])
        pq.write_table(table.set_column(0, table.schema.field("path"), column), path)
    with pytest.raises(RunError, match=r"b\.jpg' is listed twice"):
        verify(VerifyConfig(output=str(tmp_path / "out")))


# The lease
SCORING = ("scoring run", "--output")


def test_a_second_driver_is_refused_while_the_first_is_alive(source, tmp_path):
    refused = pytest.raises(InputError, match=rf"another scoring run \(process {os.getpid()} on .*\) is writing there")
    with Lease(str(tmp_path / "out"), silent, *SCORING), refused:
        run_scoring(source, tmp_path / "out")
    assert run_scoring(source, tmp_path / "out")[0]["rows"] == 7


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_lease(output, **changes):
    """Write the lease of another driver: ours, with changes."""
    with Lease(str(output), silent, *SCORING):
        record = json.loads((output / "_lease.json").read_text())
    (output / "_lease.json").write_text(json.dumps(record | changes))


def test_the_lease_of_a_dead_driver_is_taken_at_once(source, tmp_path):
    write_lease(tmp_path / "out", pid=dead_process(), process_started="1", token="dead")
    events = []
    run_scoring(source, tmp_path / "out", progress=events.append)
    assert not [event for event in events if isinstance(event, Message) and "waiting" in event.text]
    assert not (tmp_path / "out" / "_lease.json").exists()


def test_the_lease_of_another_machine_is_taken_once_it_expires(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_S", 1.0)
    monkeypatch.setattr(lease_module, "POLL_S", 0.1)
    write_lease(tmp_path / "out", host="elsewhere", token="other")
    events = []
    run_scoring(source, tmp_path / "out", progress=events.append)
    assert "on elsewhere) used" in events[0].text
    assert "waiting up to 1 s" in events[0].text


def test_a_renewed_lease_of_another_machine_refuses_the_run(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_S", 20.0)
    monkeypatch.setattr(lease_module, "POLL_S", 0.05)
    write_lease(tmp_path / "out", host="elsewhere", token="other")

    def renew(event):
        if isinstance(event, Message) and "waiting up to 20 s" in event.text:
            (tmp_path / "out" / "_lease.json").write_text('{"host": "elsewhere"}')

    with pytest.raises(InputError, match=r"another scoring run .* is writing there"):
        run_scoring(source, tmp_path / "out", progress=renew)


def test_a_driver_without_its_lease_commits_no_part(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "WATCH_S", 0.0)

    class Overtaken(ByteClassifier):
        def __call__(self, shards):
            for i, rows in enumerate(super().__call__(shards)):
                if i == 3:
                    wait_for_commit(tmp_path / "out", 0)
                    lease = json.loads((tmp_path / "out" / "_lease.json").read_text())
                    (tmp_path / "out" / "_lease.json").write_text(json.dumps(lease | {"token": "another"}))
                yield rows

    with pytest.raises(RunError, match="another scoring run took over the lease; this one stops"):
        run_scoring(source, tmp_path / "out", classifier=Overtaken())
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000.parquet"]
    assert json.loads((tmp_path / "out" / "_lease.json").read_text())["token"] == "another"


def test_a_part_that_another_driver_wrote_is_not_replaced(source, tmp_path):
    class Raced(ByteClassifier):
        def __call__(self, shards):
            for rows in super().__call__(shards):
                (tmp_path / "out" / "part-00001.parquet").write_bytes(b"another driver's")
                yield rows

    with pytest.raises(RunError, match=r"part-00001.parquet was written or removed by another process"):
        run_scoring(source, tmp_path / "out", classifier=Raced())
    assert (tmp_path / "out" / "part-00001.parquet").read_bytes() == b"another driver's"


def test_a_lease_is_taken_although_the_answer_to_its_write_got_lost(tmp_path, monkeypatch):
    create_bytes = storage.create_bytes
    monkeypatch.setattr(storage, "create_bytes", lambda *arguments: create_bytes(*arguments) and False)
    with Lease(str(tmp_path), silent, *SCORING) as lease:
        lease.check()
    assert not (tmp_path / "_lease.json").exists()


def test_a_lease_of_this_process_that_was_not_removed_refuses_no_run(source, tmp_path, monkeypatch):
    def refuse(_):
        raise RunError("the store refuses to remove it")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", refuse)
        with Lease(str(tmp_path / "out"), silent, *SCORING):
            pass
    assert (tmp_path / "out" / "_lease.json").exists()
    assert run_scoring(source, tmp_path / "out")[0]["rows"] == 7


def test_the_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    with Lease(str(tmp_path), silent, *SCORING) as lease:
        first = (tmp_path / "_lease.json").read_text()
        deadline = time.monotonic() + 10
        while (tmp_path / "_lease.json").read_text() == first and time.monotonic() < deadline:
            time.sleep(0.02)
        lease.check()
        assert (tmp_path / "_lease.json").read_text() != first
    assert not (tmp_path / "_lease.json").exists()


# On a bucket


def test_an_output_in_a_bucket_resumes_and_grows(bucket, put):
    for name in "abcdefg":
        put(f"in/{name}.jpg", name.encode())
    source, output = f"s3://{bucket}/in", f"s3://{bucket}/out"
    assert run_scoring(source, output)[0]["rows"] == 7
    assert run_scoring(source, output)[1] == []
    put("in/e.jpg", b"changed")
    put("in/h.jpg", b"new")
    assert run_scoring(source, output)[1] == ["e.jpg", "h.jpg"]
    check_output(output, 8)
    storage.remove(f"{output}/part-00000.parquet")
    assert run_scoring(source, output)[1] == ["a.jpg", "b.jpg", "c.jpg"]
    assert Plan.load(output).listing_first_shards == [0, 3]


# Versions


def interrupted(source, output):
    """Score until the second part, and return `_run.json`."""

    class Interrupted(ByteClassifier):
        def __call__(self, shards):
            yield from itertools.islice(super().__call__(shards), 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scoring(source, output, classifier=Interrupted())
    return json.loads((output / "_run.json").read_text())


def test_a_resume_with_other_versions_says_so_and_keeps_the_earlier_ones(source, tmp_path, monkeypatch):
    first = interrupted(source, tmp_path / "out")["environment"]
    assert {"catsdogs", "torch", "pillow", "simplejpeg", "ray", "device", "precision"} <= first.keys()
    monkeypatch.setattr(environment, "read_versions", lambda: dict.fromkeys(environment.PACKAGES, "9.9"))
    events = []
    run_scoring(source, tmp_path / "out", progress=events.append)
    lines = [event.text for event in events if isinstance(event, Message) and "results may differ" in event.text]
    assert len(lines) == 1
    assert f"torch was {first['torch']}, is 9.9" in lines[0]
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["earlier_environments"] == [first]
    assert record["environment"]["pillow"] == "9.9"


def test_a_resume_uses_the_precision_that_auto_became(source, tmp_path):
    config = build_config(source, tmp_path / "out")
    assert restore_precision(config) == "auto"
    record = interrupted(source, tmp_path / "out")
    assert restore_precision(config) == "auto"  # nothing is known of the precision of these rows
    for text, expected in (("cuda, bf16", "bf16"), ("cpu, fp32: probabilities in bf16 differ by 0.05", "fp32")):
        (tmp_path / "out" / "_run.json").write_text(json.dumps(record))
        with Lease(str(tmp_path / "out"), silent, *SCORING) as lease:
            record_environment(str(tmp_path / "out"), text, lease)
        assert restore_precision(config) == expected
    assert restore_precision(dataclasses.replace(config, precision="bf16")) == "bf16"
    del record["environment"]  # as an earlier version wrote it
    (tmp_path / "out" / "_run.json").write_text(json.dumps(record))
    assert run_scoring(source, tmp_path / "out")[0]["rows"] == 7
