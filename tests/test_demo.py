"""The demo's steps on few pictures; `make demo` does them on all."""

import json
import sys

import pytest

from catsdogs.config import DemoConfig
from catsdogs.demo import demo
from catsdogs.errors import InputError
from catsdogs.images import decode

module = sys.modules["catsdogs.demo"]


@pytest.mark.slow  # its steps are tested one by one, and `make demo` does them all
def test_the_demo_leaves_what_the_contract_names(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NUM_TRAIN", 32)
    monkeypatch.setattr(module, "NUM_VALIDATION", 12)
    monkeypatch.setattr(module, "NUM_UNLABELLED", 6)
    monkeypatch.setattr(module, "RECIPE", module.RECIPE | {"epochs": 1, "img_size": 32})
    table = demo(DemoConfig(output=str(tmp_path / "demo")))
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"data", "run", "evaluation", "scores", "report.html"}
    summary = json.loads((tmp_path / "demo" / "scores" / "_summary.json").read_text())
    assert summary["rows"] == 10
    assert summary["by_status"] == {"decode_error": 1, "empty": 1, "ok": 6, "truncated": 1, "unsupported": 1}
    assert json.loads((tmp_path / "demo" / "evaluation" / "metrics.json").read_text())["n"] == 12
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["draw", "train", "evaluate", "score", "report"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Confusion" in page
    assert "web page.jpg" in page


def test_the_broken_files_it_draws_are_broken_as_it_says(tmp_path):
    module._draw_unlabelled(tmp_path / "pictures", seed=1)
    status = {path.name: decode(path.read_bytes()).status for path in (tmp_path / "pictures").iterdir()}
    broken = {name: found for name, found in status.items() if found != "ok"}
    assert broken == {
        "cut off.jpg": "truncated",
        "damaged.png": "decode_error",
        "empty.jpg": "empty",
        "web page.jpg": "unsupported",
    }
    assert len(status) - len(broken) == module.NUM_UNLABELLED


def test_a_taken_output_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty or new local folder"):
        demo(DemoConfig(output=str(tmp_path)))
