"""Examples of each class in the report of a scoring."""

import re

import numpy as np
import pytest
from scoring import CLASS_NAMES, RUN_SETTINGS, ByteClassifier, build_config, read_rows, write_images

from catsdogs import report
from catsdogs.progress import silent
from catsdogs.score import examples
from catsdogs.score.pipeline import run_pipeline

NUM_FILES = 40


def score_with_examples(tmp_path, unreadable=()):
    """Score NUM_FILES files with images of their names; return the shown files of each heading, and all rows."""
    write_images(tmp_path / "in", **{f"{i:02}": f"{'ab'[i % 2]}{i}" for i in range(NUM_FILES)})

    def decode(paths):
        image = np.full((8, 8, 3), 90, np.uint8)
        return {path: image for path in paths if path.rpartition("/")[2] not in unreadable}

    config = build_config(tmp_path / "in", tmp_path / "out", shard_size=10)
    run_pipeline(config, RUN_SETTINGS, ByteClassifier(), silent, decode)
    page = (tmp_path / "out" / "_report.html").read_text()
    shown, heading = {}, None
    for text, name in re.findall(r'class="note example">(.*?)</p>|<bdi class="file"[^>]*>(.*?)</bdi>', page, re.DOTALL):
        heading = " ".join(re.sub("<[^>]*>", "", text).split()) or heading
        shown.setdefault(heading, []).extend([name] if name else [])
    return shown, read_rows(str(tmp_path / "out"))


def test_the_surest_and_the_least_sure_images_of_each_class_are_shown(tmp_path):
    shown, rows = score_with_examples(tmp_path)
    for label in CLASS_NAMES:
        own = [row for row in rows.values() if row["label"] == label]
        ordered = [row["path"].rpartition("/")[2] for row in sorted(own, key=lambda row: (-row["prob"], row["path"]))]
        assert shown[f"{label}, highest probabilities"] == ordered[: examples.NUM_EACH]
        assert set(shown[f"{label}, lowest probabilities"]) == set(ordered[-examples.NUM_EACH :])


def test_an_image_that_cannot_be_decoded_again_is_left_out(tmp_path):
    gone = {f"{i:02}.jpg" for i in range(NUM_FILES) if i % 2}
    shown, _ = score_with_examples(tmp_path, unreadable=gone)
    names = {name for found in shown.values() for name in found}
    assert names
    assert names.isdisjoint(gone)
    assert len(shown) == 2


@pytest.mark.parametrize(("parts", "read"), [(1, {"00"}), (4, {"00", "30"})])
def test_only_some_parts_of_a_large_output_are_read(tmp_path, monkeypatch, parts, read):
    monkeypatch.setattr(examples, "MAX_PARTS", min(parts, 2))
    monkeypatch.setattr(examples, "NUM_EACH", NUM_FILES)
    shown, _ = score_with_examples(tmp_path)
    names = {name for found in shown.values() for name in found}
    assert {name[:1] + "0" for name in names} == read


def test_thumbnails_have_a_limit_of_bytes(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3)).astype(np.uint8)
    picture = report.Picture(path="a.jpg", image=noise, label="a", prob=0.5)
    given = {f"class {i}": ([picture] * 6, [picture] * 6) for i in range(25)}
    html = report.class_examples(given).html
    assert 2_500_000 < len(html) < 3_200_000
    assert "class 0" in html
    assert "class 24" not in html
