"""`make bench`: the timing of a command, the sample of images, the ratios, the marks on the page."""

import math
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.speed import page
from benchmarks.speed.agreement import compare_predictions, read_predictions
from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import DECODERS, NOTEBOOK, SCORING, TRAINERS, copy_sample
from benchmarks.speed.goals import GOALS
from benchmarks.speed.ours.roofline import count_flop
from benchmarks.speed.timing import FailedError, Timing, compute_timing, time_command

SLEEP_S = 0.2
PEER = f"""
import time
from benchmarks.speed.batch_report import report_batch
for num_images in (10, 20):
    time.sleep({SLEEP_S})
    report_batch(num_images)
"""
OURS = """
for done in (8, 1_008):
    print(f"score {done:,}/1,008  note", flush=True)
"""


def test_a_peer_is_timed_by_the_batches_it_reports(tmp_path):
    timing = time_command([sys.executable, "-c", PEER], tmp_path)
    assert SLEEP_S < timing.start_s < timing.wall_s
    # Between the two batches lies at least the sleep, and less than the whole command.
    assert 20 / timing.wall_s < timing.rate < 20 / (0.99 * SLEEP_S)


def test_our_commands_are_timed_by_their_lines_of_progress(tmp_path):
    timing = time_command([sys.executable, "-c", OURS], tmp_path)
    assert 0 < timing.start_s < timing.wall_s
    assert timing.rate > 1000 / timing.wall_s


def test_the_rate_is_taken_from_the_first_batch_to_the_last():
    timing = compute_timing(100.0, 120.0, [(104.0, 8.0), (106.0, 20.0), (108.0, 48.0)])
    assert timing == Timing(start_s=4.0, rate=10.0, wall_s=20.0)


def test_one_batch_has_no_rate():
    assert math.isnan(compute_timing(100.0, 120.0, [(104.0, 8.0)]).rate)


def test_a_command_that_fails_has_no_timing(tmp_path):
    with pytest.raises(FailedError, match=r"ended with 3: out of luck"):
        time_command([sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"], tmp_path)


def test_a_sample_is_spread_over_all_images(tmp_path):
    for i in range(20):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]))
    sample = copy_sample(tmp_path / "images", 4, tmp_path / "few")
    names = sorted(str(path.relative_to(sample)) for path in sample.rglob("*.jpg"))
    assert names == ["a/00.jpg", "a/10.jpg", "b/01.jpg", "b/11.jpg"]
    assert len(list(copy_sample(tmp_path / "images", 99, tmp_path / "all").rglob("*.jpg"))) == 20


def test_the_page_has_every_contestant_and_marks_missed_goals(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PACKAGES", ())  # the peers are not installed for the tests
    contestants = [*SCORING, *DECODERS, *TRAINERS, *NOTEBOOK]
    timings = {c.name: [Timing(start_s=10, rate=100, wall_s=20)] * 2 for c in contestants}
    checks = Checks()
    checks.add("Memory: 2.0", reached=False)
    page.write_page(tmp_path / "page.md", contestants, timings, [checks.format_section()], "abc1234")
    text = (tmp_path / "page.md").read_text()
    for contestant in contestants:
        assert f"| {contestant.name} | {contestant.num_images:,} | 100.0 (100.0 to 100.0) | 1.00x |" in text
    for goal in GOALS[:-1]:  # of rates
        ratio = 3 if "roofline" in goal.what else 1
        assert (
            f"| {goal.what} | {goal.minimum:g} | {goal.target:g} | {ratio:.2f} ({ratio:.2f} to {ratio:.2f}) |" in text
        )
    assert f"| {GOALS[-1].what} | 6 | 8 | 5.50 (5.50 to 5.50) | **missed** |" in text  # (10 + 10 x 10) / 20
    assert text.count("| target reached |") == sum(goal.target <= 1 for goal in GOALS)
    assert text.count("| **missed** |") == sum(goal.minimum > 1 for goal in GOALS)
    assert "- Memory: 2.0 **missed**" in text
    assert checks.missed == ["Memory: 2.0"]


def test_the_roofline_counts_the_operations_of_torchvisions_resnet50():
    from torchvision.models import ResNet50_Weights

    counted = ResNet50_Weights.IMAGENET1K_V2.meta["_ops"]  # 10^9 multiply-adds
    assert count_flop() / 2e9 == pytest.approx(counted, rel=0.001)


def test_predictions_of_two_samples_are_compared_by_the_names_of_the_files(tmp_path):
    rows = {"all": [("0/a", "cat", 0.75), ("0/b", "cat", 0.5), ("1/a", "dog", 1.0)], "few": [("1/a", "cat", 0.5)]}
    rows["few"].append(("0/a", "cat", 1.0))
    for sample, predictions in rows.items():
        (tmp_path / sample).mkdir()
        paths, labels, probs = zip(*predictions, strict=True)
        table = pa.table({"path": [f"/x/{sample}/{path}" for path in paths], "label": labels, "prob": probs})
        pq.write_table(table, tmp_path / sample / "part-00000.parquet")
    found = compare_predictions(read_predictions(tmp_path / "all"), read_predictions(tmp_path / "few"))
    assert found == (0.5, 0.5)
