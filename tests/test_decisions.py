"""Decisions without Ray: the columns, resumed and growing scoring runs, the counts, and what is refused."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLASSES
from scoring import (
    RUN_SETTINGS,
    ByteClassifier,
    build_config,
    check_output,
    read_rows,
    run_scoring,
    write_images,
)
from web_server import Response, serve

from catsdogs import storage
from catsdogs.calibration import Calibration
from catsdogs.checkpoint import CheckpointFiles, read_config, serialize_config
from catsdogs.config import VerifyConfig
from catsdogs.decisions import Decisions, list_coverage, load_decisions, measure_coverage, measure_decisions
from catsdogs.errors import InputError, RunError
from catsdogs.evaluate.writable_config import WritableConfig
from catsdogs.images import Preprocessing
from catsdogs.predictions import build_predictions
from catsdogs.progress import silent
from catsdogs.schema import PREDICTIONS, build_schema
from catsdogs.score import verify
from catsdogs.score.run_files import build_run_settings
from catsdogs.thresholds import PrecisionCurve, build_curve

SHA256 = "0" * 64
P = 0.95
SURE = build_curve(np.linspace(1, 0.5, 300, dtype=np.float32), np.ones(300, bool))
CALIBRATION = Calibration(
    model_sha256=SHA256,
    temperature=2.0,
    fitted=True,
    n=350,
    mistakes=20,
    log_loss={"before": 0.5, "after": 0.4},
    expected_calibration_error={"before": 0.05, "after": 0.01},
    curves={"a": SURE, "b": PrecisionCurve((30, 50), (0, 20), (0.9, 0.6))},
)


def build_checkpoint(calibration=CALIBRATION, class_names=("a", "b")):
    value = calibration.to_json() if isinstance(calibration, Calibration) else calibration
    return CheckpointFiles("runs/x/best", b"", class_names, Preprocessing(), SHA256, value)


def build_rows(statuses):
    null = pa.nulls(len(statuses), pa.string())
    sizes = pa.array([1] * len(statuses), pa.int32())
    columns = {"path": [f"/x/a/{i}.jpg" for i in range(len(statuses))], "status": statuses, "error": null}
    return pa.table(columns | {"size_bytes": sizes, "width": sizes, "height": sizes})


# Columns


def test_the_columns_are_the_calibrated_probability_and_the_class_or_review():
    decisions = Decisions(P, 0.5, ("a", "b"), (0.9, None))
    probs_NK = np.float32([[0.75, 0.25], [0.6, 0.4], [0.1, 0.9], [0.99, 0.01]])
    table = build_predictions(build_rows(["ok", "ok", "ok", "empty"]), probs_NK, ("a", "b"), decisions=decisions)
    assert table.schema.equals(build_schema(with_embeddings=False, with_decisions=True))
    assert table.schema.names == [*PREDICTIONS.names, "confidence", "decision"]
    assert table["confidence"].to_pylist()[:3] == pytest.approx([0.9, 0.36 / 0.52, 0.81 / 0.82], rel=1e-6)
    assert table["confidence"][3].as_py() is None
    assert table["decision"].to_pylist() == ["a", "review", "review", None]
    assert table["label"].to_pylist() == ["a", "a", "b", None]
    assert table.select(PREDICTIONS.names).equals(
        build_predictions(build_rows(["ok", "ok", "ok", "empty"]), probs_NK, ("a", "b"))
    )


def test_a_confidence_equal_to_the_threshold_is_accepted_and_the_next_lower_one_is_not():
    threshold = np.float32(0.93)
    lower = np.nextafter(threshold, np.float32(0))
    probs_NK = np.stack([[threshold, lower], [1 - threshold, 1 - lower]], axis=1)
    columns = Decisions(P, 1.0, ("a", "b"), (float(str(threshold)), 0.5)).build_columns(probs_NK, np.zeros(2, int))
    assert columns["decision"].to_pylist() == ["a", "review"]


def test_decisions_come_last_also_with_embeddings():
    schema = build_schema(with_embeddings=True, with_decisions=True)
    assert schema.names[-3:] == ["embedding", "confidence", "decision"]
    assert schema.field("confidence").type == pa.float32()


def test_accepted_predictions_are_measured_by_class():
    columns = {"status": ["ok"] * 4 + ["empty"], "true_label": ["a", "b", "b", "a", "b"]}
    rows = pa.table(columns | {"decision": ["a", "a", "b", "review", None]})
    assert measure_decisions(rows, Decisions(P, 1.0, ("a", "b", "c"), (0.9, 0.8, None))) == {
        "min_precision": P,
        "accepted": 3,
        "review": 1,
        "accepted_share": 3 / 5,
        "precision": pytest.approx(2 / 3),
        "per_class": {
            "a": {"threshold": 0.9, "accepted": 2, "precision": 0.5},
            "b": {"threshold": 0.8, "accepted": 1, "precision": 1.0},
            "c": {"threshold": None, "accepted": 0, "precision": None},
        },
    }


def test_coverage_is_the_share_of_the_calibration_and_of_the_surest_rows():
    coverage = dict(list_coverage(CALIBRATION))
    assert coverage[0.95] == 300 / 350
    assert coverage[0.5] == 330 / 350
    observed = measure_coverage(np.float32([0.9, 0.7, 0.8]), np.array([True, False, True]))
    assert observed == [(1, 1 / 3), (1, 2 / 3), (2 / 3, 1)]


# Thresholds of a checkpoint


def test_a_class_without_a_threshold_is_reported_with_the_images_that_it_lacks():
    events = []
    decisions = load_decisions(P, build_checkpoint(), events.append)
    assert decisions.thresholds_by_class() == {"a": 0.5, "b": None}
    assert decisions.temperature == 2.0
    (message,) = events
    assert "no threshold for 'b' (29)" in message.text
    assert load_decisions(0.5, build_checkpoint(), silent).thresholds == (0.5, 0.9)
    assert load_decisions(None, build_checkpoint("damaged"), silent) is None


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (build_checkpoint(None), "found none; fit it on .*catsdogs evaluate --calibrate --checkpoint runs/x/best"),
        (build_checkpoint("damaged"), r"runs/x/best/config\.json: expected a calibration that catsdogs wrote"),
        (build_checkpoint(class_names=("a", "c")), "for the classes of label_names, found .*'b'"),
        (build_checkpoint(class_names=("a", "review")), "expected classes of other names than 'review'"),
        (
            build_checkpoint(dataclasses.replace(CALIBRATION, model_sha256="1" * 64)),
            "found one of 1111111111111111: resume",
        ),
    ],
)
def test_a_checkpoint_without_a_calibration_of_its_own_is_refused(checkpoint, words):
    with pytest.raises(InputError, match=words) as caught:
        load_decisions(P, checkpoint, silent)
    assert "\n" not in str(caught.value)


# config.json


@pytest.fixture(params=["disk", "s3"])
def model(request, tmp_path):
    uri = f"s3://{request.getfixturevalue('bucket')}/model" if request.param == "s3" else str(tmp_path)
    storage.write_bytes(f"{uri}/config.json", serialize_config(CLASSES, Preprocessing()))
    return uri


def test_a_calibration_is_added_to_the_config_and_replaced(model):
    before = json.loads(storage.read_bytes(f"{model}/config.json"))
    for temperature in (2.0, 3.0):
        calibration = dataclasses.replace(CALIBRATION, temperature=temperature).to_json()
        WritableConfig.open(model, "--calibrate").write_calibration(calibration)
        assert read_config(model).calibration["temperature"] == temperature
    after = json.loads(storage.read_bytes(f"{model}/config.json"))
    assert {name: value for name, value in after.items() if name != "calibration"} == before


def test_a_config_that_another_process_has_written_meanwhile_is_kept(model):
    config = WritableConfig.open(model, "--calibrate")
    storage.write_bytes(f"{model}/config.json", serialize_config(CLASSES, Preprocessing(img_size=96)))
    with pytest.raises(RunError, match=r"config\.json was written by another process meanwhile"):
        config.write_calibration({})
    assert read_config(model).preprocessing.img_size == 96


def test_a_checkpoint_that_cannot_be_written_is_refused_before_it_is_evaluated():
    with serve() as web:
        web.add("model/config.json", Response(body=serialize_config(CLASSES, Preprocessing())))
        with pytest.raises(InputError, match=r"^--calibrate: .*copy the checkpoint to a folder that can be written$"):
            WritableConfig.open(f"{web.url}/model", "--calibrate")


# Scoring runs


class DecidingClassifier(ByteClassifier):
    """Adds decisions to the rows of a ByteClassifier."""

    def __init__(self, decisions):
        super().__init__()
        self._decisions = decisions

    def __call__(self, shards):
        for rows in super().__call__(shards):
            probs_NK = np.array([probs or [1, 0] for probs in rows["probs"].to_pylist()], np.float32)
            columns = self._decisions.build_columns(probs_NK, probs_NK.argmax(axis=1))
            is_ok = pa.array([status == "ok" for status in rows["status"].to_pylist()])
            for name, column in columns.items():
                nulled = pa.compute.if_else(is_ok, column, pa.scalar(None, column.type))
                rows = rows.append_column(build_schema(False, True).field(name), nulled)
            yield rows


def score_with_decisions(source, output, decisions, **settings):
    run_settings = build_run_settings(build_config(source, output), build_checkpoint(), decisions)
    classifier = ByteClassifier() if decisions is None else DecidingClassifier(decisions)
    return run_scoring(source, output, run_settings, classifier, **settings)


DECISIONS = Decisions(P, 1.0, ("a", "b"), (0.6, None))
SEVEN = {name: name for name in "abcdefg"}


def check_decisions(output, summary):
    """Check every row, and the counts of the summary."""
    rows = [row for row in read_rows(str(output)).values() if row["status"] == "ok"]
    for row in rows:
        accepted = row["label"] == "a" and np.float32(row["confidence"]) >= np.float32(0.6)
        assert row["confidence"] == row["prob"]
        assert row["decision"] == ("a" if accepted else "review")
    counts = Counter(row["decision"] for row in rows)
    assert (summary["accepted"], summary["review"]) == (counts["a"], counts["review"])
    assert min(counts["a"], counts["review"]) > 0


def test_resumed_grown_and_retried_runs_have_consistent_decisions(tmp_path):
    write_images(tmp_path / "in", **SEVEN)
    (tmp_path / "in" / "z.jpg").mkdir()
    (tmp_path / "in" / "link.jpg").symlink_to("absent")
    summary, _ = score_with_decisions(tmp_path / "in", tmp_path / "out", DECISIONS)
    assert summary["thresholds"] == {"a": 0.6, "b": None}
    check_decisions(tmp_path / "out", summary)
    check_output(str(tmp_path / "out"), 8)
    write_images(tmp_path / "in", **{f"new{i}": f"{i}" for i in range(5)})
    (tmp_path / "in" / "link.jpg").unlink()
    write_images(tmp_path / "in", link="l")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    score_with_decisions(tmp_path / "in", tmp_path / "out", DECISIONS)
    summary, _ = score_with_decisions(tmp_path / "in", tmp_path / "out", DECISIONS, retry_failed=True)
    check_decisions(tmp_path / "out", summary)
    check_output(str(tmp_path / "out"), 13)
    assert verify(VerifyConfig(output=str(tmp_path / "out")))["accepted"] == summary["accepted"]
    assert "Decisions" in (tmp_path / "out" / "_report.html").read_text()
    metadata = pq.read_schema(tmp_path / "out" / "part-00000.parquet").metadata
    assert json.loads(metadata[b"catsdogs.decisions"])["min_precision"] == P


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (dataclasses.replace(DECISIONS, min_precision=0.9), r"min_precision: 0\.95 there, 0\.9 now"),
        (dataclasses.replace(DECISIONS, temperature=1.5), r"calibration: .*1\.0.* there, .*1\.5.* now"),
        (dataclasses.replace(DECISIONS, thresholds=(0.6, 0.9)), "calibration: "),
        (None, r"min_precision: 0\.95 there, null now"),
    ],
)
def test_a_resumed_run_with_another_precision_or_calibration_is_refused(tmp_path, now, words):
    write_images(tmp_path / "in", **SEVEN)
    score_with_decisions(tmp_path / "in", tmp_path / "out", DECISIONS)
    with pytest.raises(InputError, match=words):
        score_with_decisions(tmp_path / "in", tmp_path / "out", now)


@pytest.mark.parametrize(
    ("decisions", "words"),
    [
        (["a", "review", "review"], "expected decisions that are the label or review"),
        (None, "expected the column decision"),
    ],
)
def test_verify_finds_damaged_decisions(tmp_path, decisions, words):
    write_images(tmp_path / "in", **dict.fromkeys("abc", "a"))
    score_with_decisions(tmp_path / "in", tmp_path / "out", DECISIONS)
    part = tmp_path / "out" / "part-00000.parquet"
    table = pq.read_table(part).drop_columns("decision")
    pq.write_table(table if decisions is None else table.append_column("decision", pa.array(decisions)), part)
    with pytest.raises(RunError, match=words):
        verify(VerifyConfig(output=str(tmp_path / "out")))


def test_without_a_precision_the_files_are_as_before(tmp_path):
    """`write_images` gives the first file of part 0 the label a; the values are those of earlier versions."""
    write_images(tmp_path / "in", **SEVEN)
    summary, _ = run_scoring(tmp_path / "in", tmp_path / "out")
    keys = "listed rows by_status by_label unlisted other_files scored images_per_s seconds retries stage_seconds"
    assert " ".join(summary) == f"{keys} limited_by device_precisions versions model_sha256"
    settings = build_run_settings(build_config("i", "o"), build_checkpoint())
    keys = "input limit shard_size max_pixels precision model_sha256 class_names preprocessing"
    assert " ".join(settings.settings) == keys
    assert not [name for name in settings.metadata if "decision" in name]
    assert list(json.loads((tmp_path / "out" / "_stats" / "part-00000.json").read_text())) == [
        *("part", "rows", "by_status", "by_label", "histogram")
    ]
    part = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert part.schema.names == PREDICTIONS.names
    assert part.schema.metadata == {key.encode(): value.encode() for key, value in RUN_SETTINGS.metadata.items()}
    assert "Decisions" not in (tmp_path / "out" / "_report.html").read_text()
