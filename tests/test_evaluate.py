"""evaluate() on the session's Ray: files without a label count, classes are matched by name."""

import json
import shutil

import pytest
import torch

from catsdogs import checkpoint
from catsdogs.config import EvaluateConfig
from catsdogs.errors import InputError
from catsdogs.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_for(root, checkpoint, output):
    return EvaluateConfig(data_dir=str(root), checkpoint=str(checkpoint), output=str(output), precision="fp32")


def test_files_without_a_label_count_as_wrong(red_blue_root, red_blue_checkpoint, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(red_blue_root / "validation", root)
    (root / "red" / "broken.jpg").write_bytes(b"")
    (root / "blue" / "deeper").mkdir()
    shutil.move(root / "blue" / "00.jpg", root / "blue" / "deeper" / "00.jpg")
    metrics = evaluate(config_for(root, red_blue_checkpoint, tmp_path / "out"))
    assert (metrics["n"], metrics["failed"]) == (15, 1)
    assert metrics["accuracy"] == pytest.approx(14 / 15)
    assert metrics["confusion_matrix"] == [[7, 0], [0, 7]]
    assert metrics["per_class"]["red"]["recall"] == pytest.approx(7 / 8)
    assert metrics["roc_auc"] == 1.0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_classes_are_matched_by_name_whatever_their_order(red_blue_root, red_blue_checkpoint, tmp_path):
    model = checkpoint.load(str(red_blue_checkpoint))
    with torch.no_grad():
        model.model.fc.weight.copy_(model.model.fc.weight.flip(0))
    checkpoint.save(str(tmp_path / "swapped"), model.model, ("red", "blue"), model.preprocessing)
    metrics = evaluate(config_for(red_blue_root, tmp_path / "swapped", tmp_path / "out"))
    assert metrics["class_names"] == ["red", "blue"]
    assert metrics["accuracy"] == 1.0


def test_other_classes_than_the_checkpoint_has_are_refused(red_blue_root, red_blue_checkpoint, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(red_blue_root / "validation", root)
    (root / "red").rename(root / "green")
    with pytest.raises(InputError, match=r"only in the checkpoint: 'red'; only in .*: 'green'"):
        evaluate(config_for(root, red_blue_checkpoint, tmp_path / "out"))
