"""evaluate() on the session's Ray: failed files count as incorrect, classes are matched by name."""

import dataclasses
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import lines_of

from catsdogs import classify
from catsdogs.checkpoint import read_checkpoint, write_checkpoint
from catsdogs.cli import main
from catsdogs.config import EvaluateConfig, ScoreConfig, VerifyConfig
from catsdogs.errors import InputError
from catsdogs.evaluate import evaluate
from catsdogs.schema import PREDICTIONS, build_schema
from catsdogs.score import score, verify
from catsdogs.start import start_ray

pytestmark = pytest.mark.usefixtures("ray_cluster")


def build_config(root, checkpoint, output):
    return EvaluateConfig(data_dir=str(root), checkpoint=str(checkpoint), output=str(output), precision="fp32")


def classify_nothing(monkeypatch, paths):
    """Let the stages on Ray return a row without a label for each path."""
    rows = [{"path": str(path), "status": "empty", "true_label": path.parent.name} for path in paths]
    table = pa.Table.from_pylist(rows, pa.schema([*PREDICTIONS, ("device_precision", pa.string())]))
    monkeypatch.setattr(classify, "iter_predictions", lambda *_: [table])


def test_failed_files_count_as_incorrect_and_classes_are_matched_by_name(red_blue_root, red_blue_checkpoint, tmp_path):
    """The checkpoint has the classes in another order than the folder."""
    root = tmp_path / "data"
    shutil.copytree(red_blue_root / "validation", root)
    (root / "red" / "broken.jpg").write_bytes(b"")
    (root / "blue" / "deeper").mkdir()
    shutil.move(root / "blue" / "00.jpg", root / "blue" / "deeper" / "00.jpg")
    checkpoint = read_checkpoint(str(red_blue_checkpoint))
    state = checkpoint.load_state_dict()
    state |= {name: state[name].flip(0) for name in ("fc.weight", "fc.bias")}
    write_checkpoint(str(tmp_path / "swapped"), state, ("red", "blue"), checkpoint.preprocessing)
    metrics = evaluate(build_config(root, tmp_path / "swapped", tmp_path / "out"))
    assert metrics["class_names"] == ["red", "blue"]
    assert (metrics["n"], metrics["failed"]) == (15, 1)
    assert metrics["accuracy"] == pytest.approx(14 / 15)
    assert metrics["confusion_matrix"] == [[7, 0], [0, 7]]
    assert metrics["per_class"]["red"]["recall"] == pytest.approx(7 / 8)
    assert metrics["roc_auc"] == 1.0
    assert "groups" not in metrics
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_other_classes_than_those_of_the_checkpoint_are_refused(red_blue_root, red_blue_checkpoint, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(red_blue_root / "validation", root)
    (root / "red").rename(root / "green")
    with pytest.raises(InputError, match=r"only in the checkpoint: 'red'; only in .*: 'green'"):
        evaluate(build_config(root, red_blue_checkpoint, tmp_path / "out"))


@pytest.mark.parametrize("by_column", [True, False])
def test_the_frames_of_a_video_count_once(red_blue_root, red_blue_checkpoint, tmp_path, by_column):
    """One video has 6 frames under an incorrect label, four have one frame."""
    names = [("red", "long-0"), *(("blue", f"long-{i}") for i in range(1, 7))]
    names += [(label, f"short{i}-0") for i in range(2) for label in ("red", "blue")]
    rows = []
    for label, name in names:
        source = "red" if name.startswith("long") else label
        path = tmp_path / "data" / label / f"{name}-{label}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(red_blue_root / "validation" / source / "00.jpg", path)
        rows.append({"path": str(path), "label": label, "group": name.split("-")[0] if "long" in name else None})
    config = build_config(tmp_path / "data", red_blue_checkpoint, tmp_path / "out")
    if by_column:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
        config = dataclasses.replace(config, data_dir=None, labels=str(tmp_path / "labels.parquet"))
    else:
        config = dataclasses.replace(config, group_by="(long)-")
    metrics = evaluate(config)
    assert metrics["accuracy"] == pytest.approx(5 / 11)
    assert metrics["groups"] == 5
    assert metrics["group_accuracy"] == pytest.approx((1 / 7 + 4) / 5)
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_a_lost_row_is_no_result(red_blue_root, red_blue_checkpoint, tmp_path, monkeypatch):
    classify_nothing(monkeypatch, sorted((red_blue_root / "validation").rglob("*.jpg"))[1:])
    with pytest.raises(AssertionError, match="not one row for each listed file"):
        evaluate(build_config(red_blue_root, red_blue_checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_evaluate_exits_3_if_every_row_failed(red_blue_checkpoint, tmp_path, capsys, monkeypatch):
    start_ray()  # or the command would end the session's Ray when it returns
    for label in ("blue", "red"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "empty.jpg").write_bytes(b"")
    classify_nothing(monkeypatch, (tmp_path / "data").rglob("*.jpg"))
    arguments = ["--data-dir", tmp_path / "data", "--checkpoint", red_blue_checkpoint, "--output", tmp_path / "out"]
    assert main(["evaluate", *map(str, arguments)]) == 3
    assert "2 of 2 images were not classified" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["n"], metrics["failed"]) == (2, 2)
    (tmp_path / "out" / "predictions.parquet").unlink()
    (tmp_path / "out" / "predictions.parquet").mkdir()  # cannot be written
    assert main(["evaluate", *map(str, arguments)]) == 1
    assert not (tmp_path / "out" / "metrics.json").exists()  # would be of other predictions


def test_a_calibrated_checkpoint_gives_decisions_in_evaluate_and_score(red_blue_root, red_blue_checkpoint, tmp_path):
    """Seven images a class without a mistake prove a precision of 0.5, not of 0.9."""
    model, root = tmp_path / "model", red_blue_root / "validation"
    shutil.copytree(red_blue_checkpoint, model)
    config = build_config(root, model, tmp_path / "calibration")
    events = []
    metrics = evaluate(dataclasses.replace(config, calibrate=True), events.append)
    calibration = read_checkpoint(str(model)).calibration
    assert metrics["calibration"] == {name: value for name, value in calibration.items() if name != "curves"}
    assert (calibration["n"], calibration["mistakes"], calibration["temperature"]) == (14, 0, 1.0)
    assert any("fewer than 5: the temperature stays 1" in line for line in lines_of(events))
    assert pq.read_schema(tmp_path / "calibration" / "predictions.parquet").names == PREDICTIONS.names

    decided = evaluate(dataclasses.replace(config, output=str(tmp_path / "decisions"), min_precision=0.5))
    assert (decided["decisions"]["accepted"], decided["decisions"]["precision"]) == (14, 1.0)
    rows = pq.read_table(tmp_path / "decisions" / "predictions.parquet")
    assert rows.schema.names == build_schema(False, True).names
    assert rows.select(PREDICTIONS.names).equals(pq.read_table(tmp_path / "calibration" / "predictions.parquet"))

    scoring = ScoreConfig(input=str(root), checkpoint=str(model), output=str(tmp_path / "scores"), precision="fp32")
    summary = score(dataclasses.replace(scoring, min_precision=0.5))
    assert (summary["accepted"], summary["review"]) == (14, 0)
    scored = pq.read_table(tmp_path / "scores" / "part-00000.parquet")
    assert scored["decision"].equals(scored["label"])
    assert scored["confidence"].equals(scored["prob"])
    assert verify(VerifyConfig(output=str(tmp_path / "scores")))["accepted"] == 14
    with pytest.raises(InputError, match=r"min_precision: 0\.5 there, 0\.9 now"):
        score(dataclasses.replace(scoring, min_precision=0.9))


def test_a_calibration_without_a_classified_image_is_refused(red_blue_checkpoint, tmp_path, monkeypatch):
    shutil.copytree(red_blue_checkpoint, tmp_path / "model")
    for label in ("blue", "red"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "empty.jpg").write_bytes(b"")
    classify_nothing(monkeypatch, (tmp_path / "data").rglob("*.jpg"))
    config = build_config(tmp_path / "data", tmp_path / "model", tmp_path / "out")
    with pytest.raises(InputError, match="--calibrate: expected labelled images that can be classified, found none"):
        evaluate(dataclasses.replace(config, calibrate=True))
    assert read_checkpoint(str(tmp_path / "model")).calibration is None
    assert not (tmp_path / "out").exists()
