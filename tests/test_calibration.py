"""Temperature, log loss and calibration error; what config.json has of them."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize_scalar

from catsdogs.calibration import (
    compute_confidence,
    compute_expected_calibration_error,
    compute_log_loss,
    compute_reliability,
    fit_calibration,
    fit_temperature,
    parse_calibration,
)
from catsdogs.errors import InputError
from catsdogs.metrics import compute_metrics
from catsdogs.schema import PREDICTIONS

NAMES = ("a", "b", "c")
SHA256 = "0" * 64


def draw_probs(temperature, n=3000, seed=0):
    """Draw labels from the softmax of logits, and probabilities of the logits divided by a temperature."""
    rng = np.random.default_rng(seed)
    logits_NK = rng.normal(0, 2, (n, len(NAMES)))
    exp_NK = np.exp(logits_NK)
    true_N = (exp_NK.cumsum(axis=1) > rng.random((n, 1)) * exp_NK.sum(axis=1, keepdims=True)).argmax(axis=1)
    exp_NK = np.exp(logits_NK / temperature)
    return (exp_NK / exp_NK.sum(axis=1, keepdims=True)).astype(np.float32), true_N


def build_rows(probs_NK, true_N, **columns):
    index_N = probs_NK.argmax(axis=1)
    rows = {name: [None] * len(true_N) for name in PREDICTIONS.names} | {
        "path": [f"{i}.jpg" for i in range(len(true_N))],
        "status": ["ok"] * len(true_N),
        "label": [NAMES[i] for i in index_N],
        "index": index_N,
        "prob": probs_NK.max(axis=1),
        "probs": list(probs_NK),
        "true_label": [NAMES[i] for i in true_N],
    }
    return pa.table(rows | columns, schema=PREDICTIONS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_that_of_the_lowest_log_loss(temperature):
    probs_NK, true_N = draw_probs(temperature)
    found = fit_temperature(probs_NK, true_N)
    best = minimize_scalar(lambda t: compute_log_loss(probs_NK, true_N, t), bounds=(0.05, 20), options={"xatol": 1e-9})
    assert found == pytest.approx(best.x, rel=1e-4)
    assert found == pytest.approx(1 / temperature, rel=0.1)


def test_a_temperature_without_an_optimum_is_a_limit():
    probs_NK, _ = draw_probs(1.0)
    assert fit_temperature(probs_NK, probs_NK.argmax(axis=1)) == 0.01
    assert fit_temperature(probs_NK, probs_NK.argmin(axis=1)) == 100


def test_calibration_improves_log_loss_and_calibration_error():
    calibration = fit_calibration(build_rows(*draw_probs(0.4)), NAMES, SHA256)
    assert calibration.fitted
    assert calibration.log_loss["after"] < calibration.log_loss["before"] - 0.05
    error = calibration.expected_calibration_error
    assert error["after"] < error["before"] / 3
    assert "temperature 2." in calibration.describe()


def test_log_loss_before_is_that_of_the_metrics():
    rows = build_rows(*draw_probs(1.0))
    expected = compute_metrics(rows, NAMES)["log_loss"]
    assert fit_calibration(rows, NAMES, SHA256).log_loss["before"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_mistakes", "fitted"), [(4, False), (5, True)])
def test_with_fewer_than_five_mistakes_the_temperature_stays_1_and_that_is_said(num_mistakes, fitted):
    probs_NK, _ = draw_probs(1.0, n=200)
    true_N = probs_NK.argmax(axis=1)
    true_N[:num_mistakes] = (true_N[:num_mistakes] + 1) % 3
    calibration = fit_calibration(build_rows(probs_NK, true_N), NAMES, SHA256)
    assert (calibration.fitted, calibration.mistakes) == (fitted, num_mistakes)
    assert (calibration.temperature == 1) == (not fitted)
    assert ("fewer than 5: the temperature stays 1" in calibration.describe()) == (not fitted)


def test_a_probability_of_0_gives_finite_numbers_and_a_confidence_that_can_fall():
    probs_NK = np.float32([[1, 0, 0]] * 90 + [[0, 1, 0]] * 10)
    calibration = fit_calibration(build_rows(probs_NK, np.zeros(100, int)), NAMES, SHA256)
    assert calibration.temperature > 20
    assert np.isfinite([*calibration.log_loss.values()]).all()
    assert compute_confidence(probs_NK, 20.0)[0] == pytest.approx(1 / (1 + 2 * 2 ** (-149 / 20)), rel=1e-6)


def test_confidence_is_the_probability_at_temperature_1_and_keeps_the_order_of_two_classes():
    probs_N = np.sort(np.random.default_rng(0).random(500).astype(np.float32) / 2 + np.float32(0.5))
    probs_NK = np.stack([probs_N, 1 - probs_N], axis=1)
    assert np.array_equal(compute_confidence(probs_NK, 1.0), probs_N)
    for temperature in (0.3, 3.0):
        confidence_N = compute_confidence(probs_NK, temperature)
        assert confidence_N.dtype == np.float32
        assert (np.diff(confidence_N) >= 0).all()
    assert compute_confidence(np.zeros((0, 2), np.float32), 2.0).shape == (0,)


def test_the_calibration_error_has_15_bins_of_equal_width():
    """A confidence of 0.2 is the upper bound of the third bin."""
    confidence_N = np.float32([0.19, 0.2, 0.21, 0.99])
    bins = compute_reliability(confidence_N, np.array([True, False, True, True]))
    assert bins.num_rows.tolist() == [2, 1, 1]
    assert bins.accuracy.tolist() == [0.5, 1, 1]
    expected = (2 * (0.5 - 0.195) + 0.79 + 0.01) / 4
    assert compute_expected_calibration_error(bins) == pytest.approx(expected, rel=1e-6)


def test_only_classified_rows_count():
    probs_NK, true_N = draw_probs(1.0, n=50)
    rows = build_rows(probs_NK, true_N)
    failed = rows.slice(0, 1).set_column(1, PREDICTIONS.field("status"), pa.array(["empty"]))
    for name in ("label", "index", "prob", "probs"):
        i = failed.schema.get_field_index(name)
        failed = failed.set_column(i, PREDICTIONS.field(name), pa.nulls(1, PREDICTIONS.field(name).type))
    assert fit_calibration(pa.concat_tables([failed, rows]), NAMES, SHA256) == fit_calibration(rows, NAMES, SHA256)
    assert fit_calibration(failed, NAMES, SHA256) is None
    assert fit_calibration(PREDICTIONS.empty_table(), NAMES, SHA256) is None


def test_a_calibration_survives_json():
    calibration = fit_calibration(build_rows(*draw_probs(0.5)), NAMES, SHA256)
    found = parse_calibration(json.loads(json.dumps(calibration.to_json())), NAMES, "c.json")
    assert found == calibration
    assert sum(curve.num_predictions for curve in found.curves.values()) == found.n == 3000
    assert sum(curve.mistakes[-1] for curve in found.curves.values()) == found.mistakes


def without(name):
    return lambda value: {key: item for key, item in value.items() if key != name}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: 5,
        lambda _: [1, 2],
        lambda _: {"temperature": 1.0},
        without("curves"),
        without("n"),
        lambda value: value | {"extra": 1},
        lambda value: value | {"temperature": "warm"},
        lambda value: value | {"temperature": float("nan")},
        lambda value: value | {"temperature": 0},
        lambda value: value | {"curves": [1]},
        lambda value: value | {"curves": value["curves"] | {"a": {"rank": [3, 1]}}},
        lambda value: value | {"curves": without("c")(value["curves"])},
        lambda value: value | {"curves": value["curves"] | {"d": value["curves"]["a"]}},
    ],
)
def test_a_damaged_or_foreign_calibration_is_one_line_that_says_what_to_do(damage):
    value = json.loads(json.dumps(fit_calibration(build_rows(*draw_probs(0.5, n=100)), NAMES, SHA256).to_json()))
    with pytest.raises(InputError, match=r"c\.json: expected a calibration .*catsdogs evaluate --calibrate$") as caught:
        parse_calibration(damage(value), NAMES, "c.json")
    assert "\n" not in str(caught.value)


def test_a_large_validation_set_makes_a_small_config():
    probs_NK, _ = draw_probs(1.0, n=50_000)
    true_N = probs_NK.argmax(axis=1)
    true_N[::20] = (true_N[::20] + 1) % 3
    calibration = fit_calibration(build_rows(probs_NK, true_N), NAMES, SHA256)
    assert len(json.dumps(dataclasses.asdict(calibration), indent=2)) < 500_000
