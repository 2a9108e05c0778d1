"""Metrics against numbers computed by hand and by slower definitions."""

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest

from catsdogs.metrics import (
    MIN_PROB,
    MetricSums,
    compute_group_metrics,
    compute_metrics,
    per_class,
    wilson_interval,
)
from catsdogs.schema import PREDICTIONS

CLASSES = ("cats", "dogs")
FAILED = None


def make_table(rows: list[tuple[str, list[float] | None]], classes: tuple[str, ...] = CLASSES) -> pa.Table:
    """Make predictions from (true label, probabilities or FAILED)."""
    made = []
    for i, (true_label, probs) in enumerate(rows):
        row = dict.fromkeys(PREDICTIONS.names)
        row |= {"path": f"/{i}.jpg", "true_label": true_label, "status": "ok" if probs else "truncated"}
        if probs:
            index = int(np.argmax(probs))
            row |= {"index": index, "label": classes[index], "prob": probs[index], "probs": probs}
        made.append(row)
    return pa.Table.from_pylist(made, schema=PREDICTIONS)


# 4 cats: 3 classified, 2 correct; 3 dogs: 2 classified, 1 correct
EXAMPLE = [
    ("cats", [0.75, 0.25]),
    ("cats", [0.5, 0.5]),
    ("cats", [0.25, 0.75]),
    ("cats", FAILED),
    ("dogs", [0.125, 0.875]),
    ("dogs", [0.75, 0.25]),
    ("dogs", FAILED),
]


def random_predictions(num_rows: int, num_classes: int, seed: int = 0) -> tuple[pa.Table, tuple[str, ...]]:
    rng = np.random.default_rng(seed)
    classes = tuple(f"c{i}" for i in range(num_classes))
    probs = rng.dirichlet(np.ones(num_classes), num_rows).astype(np.float32)
    rows = [
        (classes[rng.integers(num_classes)], FAILED if rng.random() < 0.1 else [float(p) for p in row]) for row in probs
    ]
    return make_table(rows, classes), classes


def test_metrics_match_numbers_computed_by_hand():
    found = compute_metrics(make_table(EXAMPLE), CLASSES)
    assert found["n"] == 7
    assert found["failed"] == 2
    assert found["accuracy"] == pytest.approx(3 / 7)
    assert found["confusion_matrix"] == [[2, 1], [1, 1]]
    assert found["failed_by_class"] == [1, 1]
    assert found["class_names"] == ["cats", "dogs"]
    assert found["per_class"]["cats"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "support": 4})
    assert found["per_class"]["dogs"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "support": 3})
    assert found["log_loss"] == pytest.approx(-math.log(0.75 * 0.5 * 0.25 * 0.875 * 0.25) / 5)
    # dogs' scores .875, .25 against cats' .25, .5, .75: wins 3 + (half a win) of 6
    assert found["roc_auc"] == pytest.approx(3.5 / 6)
    assert found["accuracy_interval_95"] == pytest.approx([0.158, 0.750], abs=1e-3)


def test_metrics_are_valid_json_when_every_file_failed():
    found = compute_metrics(make_table([("cats", FAILED), ("dogs", FAILED)]), CLASSES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["accuracy"], found["n"], found["failed"]) == (0.0, 2, 2)
    assert found["log_loss"] is None
    assert found["roc_auc"] is None
    assert found["per_class"]["cats"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_classes_without_predictions_or_rows_have_zeros():
    sums = MetricSums.from_predictions(
        make_table([("a", [1.0, 0.0, 0.0]), ("b", [1.0, 0.0, 0.0])], ("a", "b", "c")), ("a", "b", "c")
    )
    found = per_class(sums, ("a", "b", "c"))
    assert found["a"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1})
    assert found["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert found["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_the_loss_of_a_zero_probability_is_finite():
    assert MetricSums.from_predictions(make_table([("cats", [0.0, 1.0])]), CLASSES).loss == pytest.approx(
        -math.log(MIN_PROB)
    )


@pytest.mark.parametrize("num_classes", [2, 5])
def test_sums_add_up_over_any_parts(num_classes):
    predictions, classes = random_predictions(300, num_classes)
    whole = MetricSums.from_predictions(predictions, classes)
    bounds = [0, 1, 1, 50, 130, 131, 300]
    parts = [MetricSums.from_predictions(predictions.slice(a, b - a), classes) for a, b in itertools.pairwise(bounds)]
    added = MetricSums.from_vector(sum(part.vector() for part in parts), num_classes)
    assert (added.matrix_KK == whole.matrix_KK).all()
    assert (added.failed_K == whole.failed_K).all()
    assert added.loss == pytest.approx(whole.loss, rel=1e-12)
    assert added.num_classified + added.num_failed == 300


def test_sums_are_restored_from_their_vector():
    whole = MetricSums.from_predictions(*random_predictions(100, 3))
    again = MetricSums.from_vector(whole.vector(), 3)
    assert whole.vector().dtype == np.float64
    assert (again.matrix_KK == whole.matrix_KK).all()
    assert (again.failed_K == whole.failed_K).all()
    assert again.loss == whole.loss
    assert (again.accuracy, again.mean_loss) == (whole.accuracy, whole.mean_loss)


def test_sums_of_chunked_and_sliced_tables_are_the_same():
    predictions, classes = random_predictions(60, 3)
    chunked = pa.concat_tables([predictions.slice(0, 7), predictions.slice(7, 20), predictions.slice(27)])
    assert (
        MetricSums.from_predictions(chunked, classes).vector().tolist()
        == MetricSums.from_predictions(predictions, classes).vector().tolist()
    )
    assert compute_metrics(chunked, classes) == compute_metrics(predictions, classes)


def test_no_rows_have_zero_sums():
    empty = MetricSums.from_predictions(PREDICTIONS.empty_table(), CLASSES)
    assert empty.vector().tolist() == [0.0] * 7
    assert math.isnan(empty.accuracy)
    assert math.isnan(empty.mean_loss)


def test_failed_rows_count_as_incorrect():
    sums = MetricSums.from_predictions(make_table([("cats", [0.9, 0.1]), ("cats", FAILED)]), CLASSES)
    assert sums.accuracy == 0.5
    assert sums.failed_K.tolist() == [1, 0]
    assert sums.mean_loss == pytest.approx(-math.log(0.9), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_auc_with_ties_matches_every_pair(seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 9, 80) / 8
    positive = rng.random(80) < 0.4
    rows = [(CLASSES[int(p)], [float(1 - s), float(s)]) for p, s in zip(positive, score, strict=True)]
    pairs = [(s > t) + (s == t) / 2 for s in score[positive] for t in score[~positive]]
    assert compute_metrics(make_table([*rows, ("cats", FAILED)]), CLASSES)["roc_auc"] == pytest.approx(
        np.mean(pairs), abs=1e-12
    )


@pytest.mark.parametrize(
    ("rows", "auc"),
    [
        ([("cats", [0.9, 0.1]), ("dogs", [0.8, 0.2])], 1.0),
        ([("cats", [0.1, 0.9]), ("dogs", [0.8, 0.2])], 0.0),
        ([("cats", [0.5, 0.5]), ("dogs", [0.5, 0.5])], 0.5),
        ([("cats", [0.5, 0.5]), ("cats", [0.9, 0.1])], None),
        ([("cats", [0.5, 0.5]), ("dogs", FAILED)], None),
    ],
)
def test_auc_of_extreme_orders(rows, auc):
    assert compute_metrics(make_table(rows), CLASSES)["roc_auc"] == auc


def test_more_than_two_classes_have_no_auc():
    assert compute_metrics(*random_predictions(30, 3))["roc_auc"] is None


@pytest.mark.parametrize(
    ("num_correct", "total", "expected"),
    [
        (0, 0, (0.0, 1.0)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (81, 263, (0.2553, 0.3662)),  # Newcombe, Stat. Med. 17, 1998, table I
        (15, 148, (0.0624, 0.1605)),
    ],
)
def test_wilson_interval(num_correct, total, expected):
    assert wilson_interval(num_correct, total) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_contains_the_fraction():
    for total in (1, 7, 1000):
        for num_correct in range(0, total + 1, max(1, total // 7)):
            low, high = wilson_interval(num_correct, total)
            assert 0 <= low <= num_correct / total + 1e-12
            assert num_correct / total - 1e-12 <= high <= 1


def test_a_long_group_counts_as_much_as_a_short_one_and_a_row_without_one_is_separate():
    """Of EXAMPLE, rows 0, 1 and 4 are correct; 2 and 5 are not, 3 and 6 failed."""
    groups = pa.chunked_array([["a", "a", "a", "b", "b", None, None]])
    found = compute_group_metrics(make_table(EXAMPLE), groups)
    assert found["groups"] == 4
    assert found["group_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)
    assert found["group_accuracy_interval_95"] == pytest.approx(wilson_interval(2 / 3 + 1 / 2, 4))
