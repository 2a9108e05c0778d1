"""The parts of the fault table: the oracle, the counter of reads, the commands, the bare pipeline, the page."""

import os
import signal
import subprocess
import sys

import psutil
import pyarrow as pa
import pytest

from benchmarks.faults import oracle, page, results, scenarios
from benchmarks.faults.bare import DecodeInProcess
from benchmarks.faults.cost import BARE, SAFE, compare
from benchmarks.faults.inputs import POISON, Inputs, is_bad
from benchmarks.faults.oracle import Row
from benchmarks.faults.processes import Command, CutError
from benchmarks.faults.reads import OpenCounter
from catsdogs.data import DecodeForInference
from catsdogs.images import MAX_PIXELS, Preprocessing
from catsdogs.schema import FILES, parquet_bytes

NAMES = ["red/1.jpg", "red/2.jpg", "red/3-empty.jpg"]
BAD_KINDS = ("empty.jpg", "cut.jpg", "text.jpg", "damaged.png")
EXPECTED = {
    NAMES[0]: Row("ok", "red", "0.9000"),
    NAMES[1]: Row("ok", "blue", "0.8000"),
    NAMES[2]: Row("empty", None, None),
}


def encode_part(*names: str, prob: float = 0.0) -> bytes:
    """Write the expected rows of files; `prob` is added to their probabilities."""
    rows = [{"path": f"/in/{name}", **EXPECTED[name]._asdict()} for name in names]
    for row in rows:
        row["prob"] = None if row["prob"] is None else float(row["prob"]) + prob
    schema = pa.schema([("path", "string"), ("status", "string"), ("label", "string"), ("prob", "float32")])
    return parquet_bytes(pa.Table.from_pylist(rows, schema=schema))


def judge(files: dict[str, bytes], ours: bool = True) -> oracle.Verdict:
    return oracle.judge(oracle.read_output(files, "/in"), NAMES, EXPECTED, ours)


COMPLETE = {
    "part-0.parquet": encode_part(*NAMES[:2]),
    "part-1.parquet": encode_part(NAMES[2]),
    "_SUCCESS": b"",
    "_summary.json": b"{}",
}


def test_a_complete_output_is_right():
    assert judge(COMPLETE).right


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Create the 2,000 files and the checkpoint once."""
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("change", "lost", "doubled", "wrong", "problem"),
    [
        ({"part-1.parquet": encode_part()}, 1, 0, 0, "_SUCCESS is there"),
        ({"part-1.parquet": encode_part(*NAMES[1:])}, 0, 1, 0, "_SUCCESS is there"),
        ({"part-0.parquet": encode_part(*NAMES[:2], prob=0.01)}, 0, 0, 2, "_SUCCESS is there"),
        ({"part-1.parquet": encode_part(NAMES[2])[:-20]}, 1, 0, 0, "part-1.parquet cannot be read"),
        ({".part-1.parquet.0": b""}, 0, 0, 0, ".part-1.parquet.0 should not be there"),
    ],
)
def test_the_oracle_finds_lost_doubled_and_wrong_rows(change, lost, doubled, wrong, problem):
    found = judge(COMPLETE | change)
    assert (found.lost, found.doubled, found.wrong) == (lost, doubled, wrong)
    assert problem in found.problems
    assert not found.right


def test_a_complete_output_without_success_is_not_right():
    assert judge({name: body for name, body in COMPLETE.items() if name != "_SUCCESS"}).problems == ["no _SUCCESS"]


def test_a_stock_output_needs_no_success_and_may_differ_a_little():
    files = {name: body for name, body in COMPLETE.items() if name.startswith("part-")}
    assert judge(files, ours=False).right
    assert judge(files | {"part-0.parquet": encode_part(*NAMES[:2], prob=0.0005)}, ours=False).right
    assert judge(files | {"part-0.parquet": encode_part(*NAMES[:2], prob=0.002)}, ours=False).wrong == 2


def test_openings_by_another_process_are_counted(tmp_path):
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "1.jpg").write_bytes(b"x")
    with OpenCounter(tmp_path) as counter:
        code = f"for _ in range(3): open({str(tmp_path / 'red' / '1.jpg')!r}, 'rb').read()"
        subprocess.run([sys.executable, "-c", code], check=True)
        list((tmp_path / "red").iterdir())
        (tmp_path / "red" / "1.jpg").stat()
    assert (counter.num_opens, counter.overflowed) == (3, False)


def test_a_command_is_killed_with_all_of_its_processes(tmp_path):
    with Command(["bash", "-c", "sleep 60 & sleep 60"], tmp_path / "log") as command:
        while len(processes := command.processes()) < 3:
            assert command.runs_for(0.05)
        command.signal(signal.SIGKILL)
        assert command.wait(60) == -signal.SIGKILL
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert (len(gone), alive, command.processes()) == (3, [], [])


def test_a_command_that_takes_too_long_is_cut(tmp_path):
    with Command(["sleep", "60"], tmp_path / "log") as command, pytest.raises(CutError):
        command.wait(0.1)


def test_the_poison_kills_the_process_that_decodes_its_file_and_no_other(inputs):
    assert POISON in inputs.names
    assert sum(map(is_bad, inputs.names)) == len(inputs.names) // 20
    code = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    damaged = next(name for name in inputs.names if name.endswith("-damaged.png"))
    codes = {}
    for name in (damaged, POISON):
        environment = os.environ | {"PYTHONPATH": scenarios.POISON_CODE}
        words = [sys.executable, "-c", code, str(inputs.link_images("images-0") / name)]
        codes[name] = subprocess.run(words, env=environment, capture_output=True, check=False).returncode
    assert codes == {damaged: 1, POISON: -signal.SIGSEGV}


def build_result(fault: str, pipeline: str, run: int, **changes: object) -> results.Result:
    values = {"injected": 1, "lost": 0, "doubled": 0, "wrong": 0, "images_read": 2000, "wall_s": 10.0, "codes": [0]}
    values |= {"cut": False, "right": True, "when": "2026-11-24T00:00:00", "revision": "abc"}
    return results.Result(fault=fault, pipeline=pipeline, run=run, **(values | changes))


def test_the_page_sums_the_runs_of_a_row(inputs, tmp_path):
    stored = results.Results(tmp_path)
    rows = [s for s in scenarios.list_scenarios(inputs) if s.name in ("none", "SIGTERM")]
    stored.add(build_result("none", "catsdogs", 0))
    for run, lost in enumerate((0, 3)):
        notes = [f"ended {run + 1.5} s after SIGTERM"]
        changes = {"lost": lost, "right": not lost, "wall_s": 15.0, "images_read": 2100, "notes": notes}
        stored.add(build_result("SIGTERM", "catsdogs", run, **changes))
    page.write_page(tmp_path / "page.md", rows, results.Results(tmp_path), {"disk": "none"})
    text = (tmp_path / "page.md").read_text()
    assert "| SIGTERM | catsdogs | 2 of 3 | 1 | 2 | 3 (3) | 0 | 0 | 5% | 1.50x | 0 |" in text
    assert "Not run: none, stock; none, stock + checkpoint; none, stock, read_images." in text
    assert "SIGTERM, catsdogs: ended 2.0 s after SIGTERM, at most 2.5 s" in text


def test_the_bare_pipeline_decodes_the_same_pixels_as_score(inputs):
    bad = [next(name for name in inputs.names if name.endswith(kind)) for kind in BAD_KINDS]
    names = [*inputs.good_names[:10], *bad]
    folder = inputs.link_images("images-0")
    paths = [str(folder / name) for name in names]
    files = pa.table({"path": paths, "size_bytes": [None] * len(names), "version": [None] * len(names)}, schema=FILES)
    stage = (Preprocessing(img_size=32), MAX_PIXELS, 8)
    bare, sandboxed = (
        pa.concat_tables(decode(files)).drop_columns(["read_s", "decode_s"])
        for decode in (DecodeInProcess(*stage), DecodeForInference(*stage))
    )
    assert bare.equals(sandboxed)
    assert bare["status"].to_pylist() == ["ok"] * 10 + ["empty", "truncated", "unsupported", "decode_error"]


def test_the_cost_is_the_ratio_within_each_pair():
    runs = [
        {"pair": pair, "pipeline": pipeline, "cpu_s_per_image": cpu_s, "wall_s": 1.0}
        for pair, pipeline, cpu_s in ((0, BARE, 2.0), (0, SAFE, 3.0), (1, SAFE, 4.0), (1, BARE, 4.0), (2, BARE, 9.0))
    ]
    assert compare(runs, "cpu_s_per_image") == (3.5, 4.0, [1.0, 1.5])
