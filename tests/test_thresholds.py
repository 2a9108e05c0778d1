"""Thresholds of confidence: the guarantee on synthetic draws, ties, early mistakes, and what is missing."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from catsdogs.thresholds import (
    LEVEL,
    PrecisionCurve,
    build_curve,
    count_missing,
    find_threshold,
    list_starts,
    parse_curve,
)

P = 0.95
NUM_DRAWS = 2000
# Probability of being correct by confidence, which is uniform in [0, 1].
SHAPES = {
    "just below P everywhere": lambda c: np.full_like(c, P - 1e-6),
    "rising to 1": lambda c: 0.8 + 0.2 * c,
    "just below P in the surer half": lambda c: np.where(c > 0.5, P - 1e-6, 0.5),
    "sharp": lambda c: np.where(c > 0.3, 0.99, 0.2),
    "surest are incorrect": lambda c: np.where(c > 0.97, 0.0, np.where(c > 0.3, 1.0, 0.2)),
    "dip": lambda c: np.where(c > 0.9, 0.9, np.where(c > 0.4, 1.0, 0.2)),
}


def draw(rng, shape, n, digits):
    confidence_N = rng.random(n)
    if digits is not None:
        confidence_N = np.floor(confidence_N * 10**digits) / 10**digits
    return confidence_N.astype(np.float32), rng.random(n) < SHAPES[shape](confidence_N)


def compute_precision(shape, threshold, digits):
    """Integrate over what is accepted."""
    confidence = np.linspace(0, 1, 20_001)[:-1]
    if digits is not None:
        confidence = np.floor(confidence * 10**digits + 1e-9) / 10**digits
    return SHAPES[shape](confidence[confidence.astype(np.float32) >= np.float32(threshold)]).mean()


@pytest.mark.parametrize(
    ("shape", "n", "digits"),
    [(shape, 400, None) for shape in SHAPES]
    + [("just below P everywhere", 60, None), ("just below P everywhere", 200, 1), ("rising to 1", 400, 1)],
)
def test_the_precision_is_too_low_in_at_most_5_percent_of_draws(shape, n, digits):
    rng = np.random.default_rng(5)
    failures = 0
    for _ in range(NUM_DRAWS):
        threshold = find_threshold(build_curve(*draw(rng, shape, n, digits)), P)
        failures += threshold is not None and compute_precision(shape, threshold, digits) < P
    assert failures / NUM_DRAWS <= LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / NUM_DRAWS)


def find_threshold_rank_by_rank(confidence_N, correct_N, min_precision):
    """Test every rank; where a tie contains a mistake, only its end."""
    order_N = np.argsort(-confidence_N, kind="stable")
    confidence_N, correct_N = confidence_N[order_N], correct_N[order_N]
    is_end_N = np.append(confidence_N[1:] != confidence_N[:-1], True)
    ranks = np.flatnonzero(is_end_N | ~np.isin(confidence_N, confidence_N[~correct_N])) + 1
    p_values = binom.cdf(np.cumsum(~correct_N)[ranks - 1], ranks, 1 - min_precision)
    starts = list_starts(len(confidence_N), min_precision)
    threshold, level = None, 0.0
    for start, end in itertools.pairwise([*starts, len(confidence_N) + 1]):
        level += LEVEL / len(starts)
        tested = np.flatnonzero((ranks >= start) & (ranks < end))
        for i in tested if len(tested) else np.flatnonzero(ranks >= start)[:1]:
            if p_values[i] > level:
                level = 0.0
                break
            threshold = confidence_N[ranks[i] - 1]
    return threshold


@pytest.mark.parametrize("digits", [None, 2, 1])
def test_the_stored_steps_give_the_threshold_of_all_ranks(digits):
    rng = np.random.default_rng(3)
    proven = 0
    for _ in range(300):
        n, min_precision = int(rng.integers(1, 500)), float(rng.choice([0.5, 0.8, 0.9, 0.95]))
        confidence_N = rng.beta(3, 0.5, n)
        correct_N = rng.random(n) < np.minimum(0.5 + confidence_N / 2, 0.99)
        confidence_N = (confidence_N if digits is None else confidence_N.round(digits)).astype(np.float32)
        found = find_threshold(build_curve(confidence_N, correct_N), min_precision)
        expected = find_threshold_rank_by_rank(confidence_N, correct_N, min_precision)
        assert (found is None) == (expected is None)
        assert found is None or np.float32(found) == expected
        proven += found is not None
    assert proven > 100


def descending(n):
    return np.linspace(1, 0.5, n, dtype=np.float32)


def test_the_bound_is_that_of_clopper_and_pearson():
    """100 predictions and P = 0.95 have one start, so each test has the full level."""
    correct_N = np.ones(100, bool)
    correct_N[[70, 94]] = False
    assert find_threshold(build_curve(descending(100), correct_N), P) == pytest.approx(descending(100)[69])
    assert beta.ppf(LEVEL, 70, 1) >= P > beta.ppf(LEVEL, 70, 2)


@pytest.mark.parametrize(("min_precision", "needed"), [(0.9, 29), (0.95, 59), (0.98, 149), (0.99, 299)])
def test_a_class_without_a_mistake_needs_as_many_predictions_as_the_bound_says(min_precision, needed):
    for n in (needed - 1, needed):
        threshold = find_threshold(build_curve(descending(n), np.ones(n, bool)), min_precision)
        assert threshold == (None if n < needed else 0.5)
    assert count_missing(PrecisionCurve(), min_precision) == needed
    assert count_missing(build_curve(descending(20), np.ones(20, bool)), min_precision) == needed - 20


def test_after_a_sure_mistake_a_later_start_gives_a_threshold():
    correct_N = np.ones(500, bool)
    correct_N[3] = False
    assert find_threshold(build_curve(descending(500), correct_N), P) == 0.5
    assert find_threshold(build_curve(descending(70), correct_N[:70]), P) is None


def test_as_many_images_as_are_missing_give_a_threshold():
    rng = np.random.default_rng(1)
    for _ in range(20):
        confidence_N = rng.random(60).astype(np.float32)
        curve = build_curve(confidence_N, rng.random(60) < 0.8)
        missing = count_missing(curve, P)
        assert find_threshold(curve.prepend_correct(missing), P) is not None
        assert find_threshold(curve.prepend_correct(missing - 1), P) is None


def test_equal_confidences_are_accepted_together_or_not_at_all():
    confidence_N = np.repeat(np.float32([0.9, 0.8]), [100, 100])
    correct_N = np.arange(200) != 150
    assert find_threshold(build_curve(confidence_N, correct_N), P) == pytest.approx(0.8)
    correct_N[100:120] = False
    assert find_threshold(build_curve(confidence_N, correct_N), P) == pytest.approx(0.9)
    correct_N[:10] = False
    assert find_threshold(build_curve(confidence_N, correct_N), P) is None


def test_a_curve_is_as_long_as_its_mistakes_and_survives_json():
    rng = np.random.default_rng(0)
    confidence_N = rng.random(50_000).astype(np.float32)
    curve = build_curve(confidence_N, np.arange(50_000) % 1000 != 0)
    assert len(curve.rank) <= 2 * 50 + 2
    assert curve.num_predictions == 50_000
    assert np.isin(np.float32(curve.confidence), confidence_N).all()
    text = json.dumps(dataclasses.asdict(curve))
    assert parse_curve(json.loads(text)) == curve
    assert len(text) < 5000


@pytest.mark.parametrize(
    "change",
    [
        {"rank": [2, 1]},
        {"rank": [1.5, 2.5]},
        {"rank": [1]},
        {"rank": "12"},
        {"mistakes": [1, 0]},
        {"mistakes": [2, 3]},
        {"mistakes": [-1, 1]},
        {"confidence": [0.5, 0.9]},
        {"confidence": [0.9, math.nan]},
        {"confidence": [1.5, 0.5]},
        {"confidence": [[0.9], [0.5]]},
        {"confidence": [True, False]},
    ],
)
def test_what_is_no_curve_is_refused(change):
    curve = {"rank": [1, 2], "mistakes": [0, 1], "confidence": [0.9, 0.5]}
    assert parse_curve(curve).num_predictions == 2
    with pytest.raises(ValueError, match="expected"):
        parse_curve(curve | change)
