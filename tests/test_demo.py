"""The steps of the demo on a few images; `make demo` runs them on all."""

import json

import pytest

from catsdogs.config import DemoConfig
from catsdogs.demo import demo
from catsdogs.demo import run as module
from catsdogs.errors import InputError
from catsdogs.images import decode_image


@pytest.mark.slow  # other tests cover each step, and `make demo` runs them all
def test_the_demo_writes_the_documented_files(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NUM_TRAIN", 32)
    monkeypatch.setattr(module, "NUM_VALIDATION", 12)
    monkeypatch.setattr(module, "NUM_UNLABELLED", 6)
    monkeypatch.setattr(module, "RECIPE", module.RECIPE | {"epochs": 1, "img_size": 32})
    table = demo(DemoConfig(output=str(tmp_path / "demo")))
    assert "10 rows for 10 files: 6 classified, 4 failed" in table
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
    assert "Confusion of 12 validation images" in page
    assert "Predictions for 10 other files" in page
    assert "Failures among 10 other files" in page


def test_each_broken_file_gets_its_status(tmp_path):
    module.draw_unlabelled(tmp_path / "images", seed=1)
    status = {path.name: decode_image(path.read_bytes()).status for path in (tmp_path / "images").iterdir()}
    broken = {name: found for name, found in status.items() if found != "ok"}
    assert broken == {
        "cut off.jpg": "truncated",
        "damaged.png": "decode_error",
        "empty.jpg": "empty",
        "web page.jpg": "unsupported",
    }
    assert len(status) - len(broken) == module.NUM_UNLABELLED


def test_an_output_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty local folder"):
        demo(DemoConfig(output=str(tmp_path)))
