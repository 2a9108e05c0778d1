"""The parts of `make bench` that could lie: the clock, the choice of images, the ratios, the marks."""

import math
import sys

import pytest

from benchmarks.speed import page
from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import DECODERS, NOTEBOOK, SCORING, TRAINERS, sample
from benchmarks.speed.goals import GOALS
from benchmarks.speed.timing import FailedError, Timing, timed

PEER = (
    "from benchmarks.speed.peers.common import tell; import time; time.sleep(0.5); tell(10); time.sleep(0.5); tell(20)"
)
OURS = "import time\nfor done in (8, 1_008):\n    print(f'score {done:,}/1,008  note', flush=True); time.sleep(0.5)"


def test_a_peer_is_timed_from_its_first_batch_to_its_last(tmp_path):
    timing = timed([sys.executable, "-c", PEER], tmp_path)
    assert 0.5 < timing.start_s < timing.wall_s - 0.5
    assert timing.rate == pytest.approx(20 / 0.5, rel=0.3)


def test_ours_is_timed_by_its_lines_of_progress(tmp_path):
    assert timed([sys.executable, "-c", OURS], tmp_path).rate == pytest.approx(1000 / 0.5, rel=0.3)


def test_one_batch_alone_has_no_rate(tmp_path):
    assert math.isnan(timed([sys.executable, "-c", OURS.replace("(8, 1_008)", "(8,)")], tmp_path).rate)


def test_a_command_that_fails_is_no_timing(tmp_path):
    with pytest.raises(FailedError, match=r"ended with 3: out of luck"):
        timed([sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"], tmp_path)


def test_a_sample_is_spread_over_all_images(tmp_path):
    for i in range(20):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]))
    found = sample(tmp_path / "images", 4, tmp_path / "few")
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*.jpg")) == [
        "a/00.jpg",
        "a/10.jpg",
        "b/01.jpg",
        "b/11.jpg",
    ]
    assert len(list(sample(tmp_path / "images", 99, tmp_path / "all").rglob("*.jpg"))) == 20


def test_the_page_has_every_contestant_and_marks_what_was_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PACKAGES", ())  # the peers are not installed for the tests
    contestants = [*SCORING, *DECODERS, *TRAINERS, *NOTEBOOK]
    timings = {one.name: [Timing(start_s=10, rate=100, wall_s=20)] * 2 for one in contestants}
    checks = Checks()
    checks.note("Memory: 2.0", False)
    page.write_page(tmp_path / "page.md", contestants, timings, [checks.section()], "abc1234")
    text = (tmp_path / "page.md").read_text()
    assert all(f"| {one.name} | {one.num_images:,} | 100.0 (100.0 to 100.0) | 1.00x |" in text for one in contestants)
    rates = GOALS[:-1]
    assert all(f"| {goal.what} | {goal.least:g} | {goal.aim:g} | 1.00 (1.00 to 1.00) |" in text for goal in rates)
    assert f"| {GOALS[-1].what} | 6 | 8 | 5.50 (5.50 to 5.50) | **missed** |" in text  # (10 + 10 x 10) / 20
    assert text.count("| aim reached |") == sum(goal.aim <= 1 for goal in GOALS)
    assert "- Memory: 2.0 **missed**" in text
    assert checks.missed == ["Memory: 2.0"]
