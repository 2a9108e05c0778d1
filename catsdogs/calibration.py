"""Calibration of a model on labelled images: one temperature, and how precise its surest predictions are.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599. A calibrated
probability is softmax(log(prob) / temperature); the predicted class stays the same.

Shapes: N rows, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.errors import InputError
from catsdogs.schema import OK
from catsdogs.thresholds import BoolArray, FloatArray, PrecisionCurve, build_curve, parse_curve

MIN_MISTAKES = 5  # with fewer, the best temperature is that of single images
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
NUM_BINS = 15  # of equal width, as in Guo et al.
MIN_PROB = np.float32(2.0**-149)  # the smallest float32: a probability of 0 counts as this much
BISECTIONS = 30


@dataclass(frozen=True)
class Calibration:
    """What `config.json` has of the calibration of a checkpoint.

    Attributes:
        model_sha256: of the weights that it belongs to.
        fitted: whether the temperature was fitted; with fewer than MIN_MISTAKES mistakes it stays 1.
        n: classified images.
        log_loss: mean cross-entropy `before` and `after`.
        expected_calibration_error: `before` and `after`.
        curves: by class name.
    """

    model_sha256: str
    temperature: float
    fitted: bool
    n: int
    mistakes: int
    log_loss: Mapping[str, float]
    expected_calibration_error: Mapping[str, float]
    curves: Mapping[str, PrecisionCurve]

    def to_json(self) -> dict[str, Any]:
        """Convert to values of JSON."""
        return asdict(self)

    def summarize(self) -> dict[str, Any]:
        """Build the entry of `metrics.json`: all but the curves."""
        return {name: value for name, value in asdict(self).items() if name != "curves"}

    def describe(self) -> str:
        """Describe the calibration in one line."""
        error = self.expected_calibration_error
        if not self.fitted:
            return (
                f"calibration: {self.mistakes} of {self.n:,} labelled images are mistakes, fewer than {MIN_MISTAKES}: "
                f"the temperature stays 1; expected calibration error {error['before']:.4f}"
            )
        return (
            f"calibration on {self.n:,} labelled images: temperature {self.temperature:.3f}, "
            f"expected calibration error {error['before']:.4f} before, {error['after']:.4f} after"
        )


class Reliability(NamedTuple):
    """Bins of confidence that are not empty: mean confidence, share of correct rows, and number of rows of each."""

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    num_rows: npt.NDArray[np.int64]


class LabelledProbs(NamedTuple):
    """The classified rows of predictions: float32 (N, K), and the indices of predicted and true class, (N,)."""

    probs_NK: FloatArray
    index_N: npt.NDArray[np.int64]
    true_N: npt.NDArray[np.int64]

    @classmethod
    def from_predictions(cls, predictions: pa.Table, class_names: Sequence[str]) -> "LabelledProbs":
        """Select the classified rows with a true label."""
        names = pa.array(class_names, pa.string())
        true_index = pc.index_in(predictions["true_label"], names)
        rows = pa.table({"index": predictions["index"], "true": true_index, "probs": predictions["probs"]})
        rows = rows.filter(pc.and_(pc.equal(predictions["status"], OK), pc.is_valid(true_index))).combine_chunks()
        probs = rows["probs"].combine_chunks()
        probs_NK = np.asarray(probs.flatten()).reshape(rows.num_rows, len(class_names))
        return cls(probs_NK, *(rows[name].to_numpy().astype(np.int64) for name in ("index", "true")))

    @property
    def is_correct(self) -> BoolArray:
        """Whether each row is correct."""
        return np.asarray(self.index_N == self.true_N)


def fit_calibration(predictions: pa.Table, class_names: Sequence[str], model_sha256: str) -> Calibration | None:
    """Fit a calibration to a model's predictions of labelled images; None if no row is classified."""
    rows = LabelledProbs.from_predictions(predictions, class_names)
    if not len(rows.true_N):
        return None
    correct_N = rows.is_correct
    mistakes = int((~correct_N).sum())
    fitted = mistakes >= MIN_MISTAKES
    temperature = fit_temperature(rows.probs_NK, rows.true_N) if fitted else 1.0
    confidences = {"before": rows.probs_NK.max(axis=1), "after": compute_confidence(rows.probs_NK, temperature)}
    after_N = confidences["after"]
    return Calibration(
        model_sha256=model_sha256,
        temperature=temperature,
        fitted=fitted,
        n=len(correct_N),
        mistakes=mistakes,
        log_loss={
            when: compute_log_loss(rows.probs_NK, rows.true_N, value)
            for when, value in (("before", 1.0), ("after", temperature))
        },
        expected_calibration_error={
            when: compute_expected_calibration_error(compute_reliability(confidence_N, correct_N))
            for when, confidence_N in confidences.items()
        },
        curves={
            name: build_curve(after_N[rows.index_N == i], correct_N[rows.index_N == i])
            for i, name in enumerate(class_names)
        },
    )


def fit_temperature(probs_NK: FloatArray, true_N: npt.NDArray[np.int64]) -> float:
    """Find the temperature of the lowest log loss, within [MIN_TEMPERATURE, MAX_TEMPERATURE].

    The log loss is convex in 1 / temperature: bisection finds where its slope is 0.
    """
    log_NK = np.log(np.maximum(probs_NK, MIN_PROB))
    log_true = float(log_NK[np.arange(len(true_N)), true_N].mean(dtype=np.float64))
    low, high = np.log(1 / MAX_TEMPERATURE), np.log(1 / MIN_TEMPERATURE)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        expected_N = (_softmax(log_NK * np.float32(np.exp(middle))) * log_NK).sum(axis=1)
        if expected_N.mean(dtype=np.float64) < log_true:
            low = middle
        else:
            high = middle
    return round(float(np.exp(-(low + high) / 2)), 6)


def compute_confidence(probs_NK: FloatArray, temperature: float) -> FloatArray:
    """Compute the calibrated probability of the predicted class, float32 (N,); with temperature 1 the probability."""
    if temperature == 1:
        return np.asarray(probs_NK.max(axis=1, initial=0.0))
    return np.asarray(_softmax(_scale(probs_NK, temperature)).max(axis=1, initial=0.0), dtype=np.float32)


def scale_probs(probs_NK: FloatArray, temperature: float) -> FloatArray:
    """Compute the calibrated probabilities of all classes, float32 (N, K)."""
    return _softmax(_scale(probs_NK, temperature)).astype(np.float32)


def compute_log_loss(probs_NK: FloatArray, true_N: npt.NDArray[np.int64], temperature: float) -> float:
    """Compute the mean cross-entropy of calibrated probabilities."""
    scaled_NK = _scale(probs_NK, temperature)
    top_N1 = scaled_NK.max(axis=1, keepdims=True)
    log_sum_N = top_N1[:, 0] + np.log(np.exp(scaled_NK - top_N1).sum(axis=1))
    return float((log_sum_N - scaled_NK[np.arange(len(true_N)), true_N]).mean())


def compute_reliability(confidence_N: FloatArray, correct_N: BoolArray) -> Reliability:
    """Average confidence and accuracy in NUM_BINS bins of equal width, without the lower and with the upper bound."""
    bin_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    count = np.bincount(bin_N, minlength=NUM_BINS)
    sums = [np.bincount(bin_N, values, NUM_BINS)[count > 0] for values in (confidence_N, correct_N)]
    return Reliability(sums[0] / count[count > 0], sums[1] / count[count > 0], count[count > 0])


def compute_expected_calibration_error(bins: Reliability) -> float:
    """Compute the mean difference of accuracy and confidence, weighted by rows (Naeini et al., AAAI 2015)."""
    return float(np.average(np.abs(bins.accuracy - bins.confidence), weights=bins.num_rows))


def parse_calibration(value: object, class_names: Sequence[str], source: str) -> Calibration:
    """Read what `Calibration.to_json` wrote; raises InputError with `source`."""
    expected = f"{source}: expected a calibration that catsdogs wrote"
    advice = "fit it again: catsdogs evaluate --calibrate"
    try:
        content = dict(value)  # type: ignore[call-overload]  # TypeError where it is no mapping
        curves = {name: parse_curve(curve) for name, curve in dict(content.pop("curves")).items()}
        found = Calibration(curves=curves, **content)
        valid = MIN_TEMPERATURE <= found.temperature <= MAX_TEMPERATURE and bool(found.describe())
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{expected}: {type(error).__name__}: {str(error)[:100]}; {advice}") from error
    if not valid:
        raise InputError(f"{expected}, found the temperature {found.temperature!r}; {advice}")
    if found.curves.keys() != set(class_names):
        raise InputError(f"{expected} for the classes of label_names, found {sorted(found.curves)!r:.80}; {advice}")
    return found


def _scale(probs_NK: FloatArray, temperature: float) -> npt.NDArray[np.float64]:
    return np.log(np.maximum(probs_NK, MIN_PROB).astype(np.float64)) / temperature


def _softmax(logits_NK: npt.NDArray[Any]) -> npt.NDArray[Any]:
    exp_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(exp_NK / exp_NK.sum(axis=1, keepdims=True))
