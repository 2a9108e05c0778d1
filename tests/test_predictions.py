"""Decoded rows and probabilities become the output's columns."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from conftest import CLASSES

from catsdogs.errors import RunError
from catsdogs.predictions import build_predictions, find_true_labels
from catsdogs.schema import PREDICTIONS, build_schema


def decoded(statuses: list[str], folders: list[str] | None = None) -> pa.Table:
    """Build rows as the decoding stage returns them."""
    folders = folders or ["red"] * len(statuses)
    ok = [status == "ok" for status in statuses]
    return pa.table(
        {
            "path": [f"s3://b/{folder}/{i}.jpg" for i, folder in enumerate(folders)],
            "size_bytes": pa.array([10 + i for i in range(len(statuses))], pa.int64()),
            "status": statuses,
            "error": pa.array([None if good else "why" for good in ok], pa.string()),
            "width": pa.array([40 if good else None for good in ok], pa.int32()),
            "height": pa.array([36 if good else None for good in ok], pa.int32()),
            "image": [b""] * len(statuses),
        }
    )


PROBS_NK = np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]], dtype=np.float32)


def test_embeddings_become_a_column_that_is_null_for_failed_rows():
    features_ND = np.arange(6, dtype=np.float32).reshape(2, 3)
    table = build_predictions(decoded(["ok", "truncated"]), PROBS_NK[:2], CLASSES, features_ND)
    assert table.schema.equals(build_schema(True, False))
    assert table["embedding"].to_pylist() == [[0, 1, 2], None]


def test_predictions_have_the_schema_and_the_rows():
    table = build_predictions(decoded(["ok", "ok", "ok"], ["red", "blue", "green"]), PROBS_NK, CLASSES)
    assert table.schema.equals(PREDICTIONS)
    assert table.to_pylist()[2] == {
        "path": "s3://b/green/2.jpg",
        "status": "ok",
        "label": "red",
        "index": 1,
        "prob": 0.875,
        "probs": [0.125, 0.875],
        "error": None,
        "width": 40,
        "height": 36,
        "size_bytes": 12,
        "true_label": None,
    }
    assert table["label"].to_pylist() == ["blue", "blue", "red"]
    assert table["true_label"].to_pylist() == ["red", "blue", None]


@pytest.mark.parametrize("statuses", [["truncated", "ok", "not_found"], ["empty", "empty", "empty"]])
def test_failed_rows_have_nulls_in_the_models_columns(statuses):
    rows = build_predictions(decoded(statuses), PROBS_NK, CLASSES).to_pylist()
    for row, status in zip(rows, statuses, strict=True):
        assert row["status"] == status
        assert row["true_label"] == "red"
        for name in ("label", "index", "prob", "probs", "width", "height"):
            assert (row[name] is None) == (status != "ok"), name
        assert (row["error"] is None) == (status == "ok")
    assert [row["size_bytes"] for row in rows] == [10, 11, 12]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_probabilities_that_are_no_numbers_are_never_ok(value):
    probs_NK = PROBS_NK.copy()
    probs_NK[1, 0] = value
    with pytest.raises(
        RunError, match=r"s3://b/red/1\.jpg: expected probabilities from 0 to 1, the model computed NaN"
    ):
        build_predictions(decoded(["ok"] * 3), probs_NK, CLASSES)
    rows = build_predictions(decoded(["ok", "empty", "ok"]), probs_NK, CLASSES)
    assert rows["probs"].to_pylist()[1] is None


def test_sliced_and_chunked_rows_give_the_same_table():
    rows = decoded(["ok", "truncated", "ok"])
    chunked = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    longer = decoded(["empty", "ok", "truncated", "ok"])
    assert build_predictions(chunked, PROBS_NK, CLASSES).equals(build_predictions(rows, PROBS_NK, CLASSES))
    sliced = build_predictions(longer.slice(1), PROBS_NK, CLASSES)
    assert sliced["probs"].to_pylist() == build_predictions(rows, PROBS_NK, CLASSES)["probs"].to_pylist()


def test_no_rows_give_an_empty_table_of_the_schema():
    table = build_predictions(decoded([]), np.zeros((0, 2), np.float32), CLASSES)
    assert table.schema.equals(PREDICTIONS)
    assert table.num_rows == 0


def test_a_true_index_takes_precedence_over_the_folder():
    rows = decoded(["ok", "ok"], ["red", "deep"]).append_column("true_index", pa.array([0, 1], pa.int32()))
    assert find_true_labels(rows, CLASSES).to_pylist() == ["blue", "red"]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/data/red/1.jpg", "red"),
        ("s3://red/blue/1.jpg", "blue"),
        ("/data/red/sub/1.jpg", None),
        ("/data/Red/1.jpg", None),
        ("file:///data/red/%FF.jpg", "red"),
        ("1.jpg", None),
    ],
)
def test_the_parent_folder_is_the_true_label_where_it_is_a_class(path, label):
    assert find_true_labels(pa.table({"path": [path]}), CLASSES).to_pylist() == [label]


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_true_label_is_the_class_in_any_unicode_form(form, other):
    names = [unicodedata.normalize(form, name) for name in ("café", "thé")]
    rows = decoded(["ok", "ok"], [unicodedata.normalize(other, "thé"), "the"])
    assert find_true_labels(rows, names).to_pylist() == [names[1], None]
