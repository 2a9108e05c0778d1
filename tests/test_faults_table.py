"""The fault table's own parts: what the oracle sees, what is counted, what is killed, what stands on the page."""

import os
import signal
import subprocess
import sys

import psutil
import pyarrow as pa
import pytest

from benchmarks.faults import oracle, page, results, scenarios
from benchmarks.faults.inputs import POISON, Inputs, is_bad
from benchmarks.faults.oracle import Row
from benchmarks.faults.processes import Command, CutError
from benchmarks.faults.reads import OpenCounter
from catsdogs.schema import parquet_bytes

NAMES = ["red/1.jpg", "red/2.jpg", "red/3-empty.jpg"]
EXPECTED = {
    NAMES[0]: Row("ok", "red", "0.9000"),
    NAMES[1]: Row("ok", "blue", "0.8000"),
    NAMES[2]: Row("empty", None, None),
}


def part(*names: str, prob: float = 0.0) -> bytes:
    rows = [{"path": f"/in/{name}", **EXPECTED[name]._asdict()} for name in names]
    for row in rows:
        row["prob"] = None if row["prob"] is None else float(row["prob"]) + prob
    schema = pa.schema([("path", "string"), ("status", "string"), ("label", "string"), ("prob", "float32")])
    return parquet_bytes(pa.Table.from_pylist(rows, schema=schema))


def verdict(files: dict[str, bytes], ours: bool = True) -> oracle.Verdict:
    return oracle.judge(oracle.read(files, "/in"), NAMES, EXPECTED, ours)


WHOLE = {"part-0.parquet": part(*NAMES[:2]), "part-1.parquet": part(NAMES[2]), "_SUCCESS": b"", "_summary.json": b"{}"}


def test_a_whole_output_is_right():
    assert verdict(WHOLE).right


@pytest.mark.parametrize(
    ("change", "lost", "doubled", "wrong", "problem"),
    [
        ({"part-1.parquet": part()}, 1, 0, 0, "_SUCCESS is there"),
        ({"part-1.parquet": part(*NAMES[1:])}, 0, 1, 0, "_SUCCESS is there"),
        ({"part-0.parquet": part(*NAMES[:2], prob=0.01)}, 0, 0, 2, "_SUCCESS is there"),
        ({"part-1.parquet": part(NAMES[2])[:-20]}, 1, 0, 0, "part-1.parquet cannot be read"),
        ({".part-1.parquet.0": b""}, 0, 0, 0, ".part-1.parquet.0 should not be there"),
    ],
)
def test_the_oracle_sees_what_is_wrong(change, lost, doubled, wrong, problem):
    found = verdict(WHOLE | change)
    assert (found.lost, found.doubled, found.wrong) == (lost, doubled, wrong)
    assert problem in found.problems
    assert not found.right


def test_a_right_output_without_success_is_not_right():
    assert verdict({name: body for name, body in WHOLE.items() if name != "_SUCCESS"}).problems == ["no _SUCCESS"]


def test_a_stock_output_has_no_success_and_small_differences_of_its_own():
    files = {name: body for name, body in WHOLE.items() if name.startswith("part-")}
    assert verdict(files, ours=False).right
    assert verdict(files | {"part-0.parquet": part(*NAMES[:2], prob=0.0005)}, ours=False).right
    assert verdict(files | {"part-0.parquet": part(*NAMES[:2], prob=0.002)}, ours=False).wrong == 2


def test_opened_images_are_counted_whoever_opens_them(tmp_path):
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "1.jpg").write_bytes(b"x")
    with OpenCounter(tmp_path) as counter:
        code = f"for _ in range(3): open({str(tmp_path / 'red' / '1.jpg')!r}, 'rb').read()"
        subprocess.run([sys.executable, "-c", code], check=True)
        list((tmp_path / "red").iterdir())
        (tmp_path / "red" / "1.jpg").stat()
    assert (counter.num_opens, counter.overflowed) == (3, False)


def test_a_command_is_ended_with_all_that_it_started(tmp_path):
    with Command(["bash", "-c", "sleep 60 & sleep 60"], tmp_path / "log") as command:
        assert command.runs_for(0.5)
        found = command.processes()
        assert len(found) == 3
        command.signal(signal.SIGKILL)
        assert command.wait(5) == -signal.SIGKILL
    psutil.wait_procs(found, timeout=5)
    assert command.processes() == []


def test_a_command_that_takes_too_long_is_cut(tmp_path):
    with Command(["sleep", "60"], tmp_path / "log") as command, pytest.raises(CutError):
        command.wait(0.1)


def test_the_poison_kills_whoever_decodes_that_file_and_no_other(tmp_path):
    inputs = Inputs(tmp_path)
    assert POISON in inputs.names
    assert sum(map(is_bad, inputs.names)) == len(inputs.names) // 20
    code = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    damaged = next(name for name in inputs.names if name.endswith("-damaged.png"))
    codes = {}
    for name in (damaged, POISON):
        environment = os.environ | {"PYTHONPATH": scenarios.POISON_CODE}
        words = [sys.executable, "-c", code, str(inputs.linked("images-0") / name)]
        codes[name] = subprocess.run(words, env=environment, capture_output=True, check=False).returncode
    assert codes == {damaged: 1, POISON: -signal.SIGSEGV}


def result(fault: str, pipeline: str, run: int, **changes: object) -> results.Result:
    values = {"injected": 1, "lost": 0, "doubled": 0, "wrong": 0, "images_read": 2000, "wall_s": 10.0, "codes": [0]}
    values |= {"cut": False, "right": True, "when": "2026-11-24T00:00:00", "revision": "abc"}
    return results.Result(fault=fault, pipeline=pipeline, run=run, **(values | changes))


def test_the_page_adds_the_runs_of_a_row_up(tmp_path):
    kept = results.Results(tmp_path)
    rows = [s for s in scenarios.scenarios(Inputs(tmp_path)) if s.name in ("none", "SIGTERM")]
    kept.add(result("none", "catsdogs", 0))
    for run, lost in enumerate((0, 3)):
        notes = [f"ended {run + 1.5} s after SIGTERM"]
        kept.add(
            result("SIGTERM", "catsdogs", run, lost=lost, right=not lost, wall_s=15.0, images_read=2100, notes=notes)
        )
    page.write_page(tmp_path / "page.md", rows, results.Results(tmp_path), {"disk": "none"})
    text = (tmp_path / "page.md").read_text()
    assert "| SIGTERM | catsdogs | 2 of 3 | 1 | 2 | 3 (3) | 0 | 0 | 5% | 1.50x | 0 |" in text
    assert "Not run: none, stock; none, stock + checkpoint; none, stock, read_images." in text
    assert "SIGTERM, catsdogs: ended 2.0 s after SIGTERM, at most 2.5 s" in text
