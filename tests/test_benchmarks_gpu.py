"""`benchmarks.speed.gpu`: its sections end alone, and its checks run on a CPU, too."""

import json
import sys
import time

import psutil

from benchmarks.speed import gpu

HANGING = """
import json, subprocess, sys, time
print("not a figure")
print(json.dumps({"figure": "rate", "value": 2.5}), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"figure": "child", "value": child.pid}), flush=True)
time.sleep(600)
"""


def test_a_section_that_hangs_is_ended_with_its_children_and_keeps_its_figures(capsys):
    figures = gpu.run_section("hanging", [sys.executable, "-c", HANGING], limit_s=3.0)
    assert figures["rate"] == 2.5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cut"] is True
    deadline = time.monotonic() + 10
    while is_running(int(figures["child"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(int(figures["child"]))


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_checks_run_on_a_cpu(tmp_path, monkeypatch, capsys):
    flags = ["--smoke", "--sections", "checks", "--images", str(tmp_path), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    gpu.main()
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert records[-1]["rc"] == 0, printed
    figures = {record["figure"]: record["value"] for record in records if "figure" in record}
    differences = [value for name, value in figures.items() if name.startswith("augmentation")]
    assert len(differences) == 3
    assert max(differences) <= 1
    assert all(name in (tmp_path / "page.md").read_text() for name in figures)
