"""Decisions: which predictions are accepted at a precision, and which are for a person to review.

N rows, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.calibration import Calibration, compute_confidence, parse_calibration
from catsdogs.checkpoint import CONFIG, CheckpointFiles
from catsdogs.errors import InputError
from catsdogs.progress import Message, Progress
from catsdogs.schema import OK
from catsdogs.thresholds import BoolArray, FloatArray, count_missing, find_threshold

REVIEW = "review"
MAX_NAMED_CLASSES = 5  # in a message
COVERAGE_GRID = (0.9, 0.95, 0.98, 0.99)  # precisions that the report names
MAX_COVERAGE_POINTS = 200  # of a curve


@dataclass(frozen=True)
class Decisions:
    """Thresholds of confidence, by class in index order; None where no threshold has the precision."""

    min_precision: float
    temperature: float
    class_names: tuple[str, ...]
    thresholds: tuple[float | None, ...]

    def build_columns(self, probs_NK: FloatArray, index_N: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
        """Build the columns `confidence` and `decision`, for rows of any status."""
        confidence_N = compute_confidence(probs_NK, self.temperature)
        threshold_K = np.array([np.inf if value is None else value for value in self.thresholds], np.float32)
        outcomes = pa.array([*self.class_names, REVIEW], pa.string())
        outcome_N = np.where(confidence_N >= threshold_K[index_N], index_N, len(self.class_names))
        return {"confidence": pa.array(confidence_N), "decision": outcomes.take(pa.array(outcome_N))}

    def thresholds_by_class(self) -> dict[str, float | None]:
        """Return the thresholds by class name."""
        return dict(zip(self.class_names, self.thresholds, strict=True))

    def settings(self) -> dict[str, Any]:
        """Return what the rows depend on, for `_run.json`."""
        calibration = {"temperature": self.temperature, "thresholds": self.thresholds_by_class()}
        return {"min_precision": self.min_precision, "calibration": calibration}


def load_decisions(min_precision: float | None, checkpoint: CheckpointFiles, progress: Progress) -> Decisions | None:
    """Find the thresholds of a checkpoint for a precision, and report the classes that have none.

    Returns:
        None without a precision.

    Raises:
        InputError: the checkpoint has no calibration, or a damaged one, or a class is named `review`.
    """
    if min_precision is None:
        return None
    uri = storage.join(checkpoint.uri, CONFIG)
    if checkpoint.calibration is None:
        raise InputError(
            f"--min-precision: expected a calibration in {uri}, found none; fit it on labelled images that were not "
            f"trained on: catsdogs evaluate --calibrate --checkpoint {checkpoint.uri}"
        )
    if REVIEW in checkpoint.class_names:
        raise InputError(f"--min-precision: expected classes of other names than {REVIEW!r}, which marks a decision")
    calibration = parse_calibration(checkpoint.calibration, checkpoint.class_names, uri)
    if calibration.model_sha256 != checkpoint.sha256:
        raise InputError(
            f"{uri}: expected the calibration of the model with SHA-256 {checkpoint.sha256[:16]}, found one of "
            f"{calibration.model_sha256!s:.16}: resume its training, or fit it again: catsdogs evaluate --calibrate"
        )
    thresholds = tuple(find_threshold(calibration.curves[name], min_precision) for name in checkpoint.class_names)
    decisions = Decisions(min_precision, calibration.temperature, checkpoint.class_names, thresholds)
    if None in thresholds:
        progress(Message(_describe_missing(decisions, calibration)))
    return decisions


def _describe_missing(decisions: Decisions, calibration: Calibration) -> str:
    """Say which classes have no threshold, and how many labelled images they lack at least."""
    names = [name for name, value in decisions.thresholds_by_class().items() if value is None]
    shown = ", ".join(
        f"{name!r} ({count_missing(calibration.curves[name], decisions.min_precision):,})"
        for name in names[:MAX_NAMED_CLASSES]
    )
    more = f" and {len(names) - MAX_NAMED_CLASSES} more classes" if len(names) > MAX_NAMED_CLASSES else ""
    return (
        f"--min-precision {decisions.min_precision:g}: no threshold for {shown}{more}: all images of these classes are "
        f"{REVIEW}; in brackets, how many more labelled images that are predicted as the class, all correctly, the "
        "calibration needs at least"
    )


def count_decisions(by_decision: Mapping[str, int]) -> dict[str, int]:
    """Count accepted rows and those to review."""
    review = by_decision.get(REVIEW, 0)
    return {"accepted": sum(by_decision.values()) - review, "review": review}


def measure_decisions(predictions: pa.Table, decisions: Decisions) -> dict[str, Any]:
    """Compute the entry of `metrics.json` from labelled predictions with decisions: precision of what is accepted."""
    is_ok = pc.equal(predictions["status"], OK)
    accepted = predictions.filter(pc.and_(is_ok, pc.not_equal(predictions["decision"], REVIEW)))
    is_correct = np.asarray(pc.equal(accepted["decision"], accepted["true_label"]))
    names_N = np.array(accepted["decision"].to_pylist(), dtype=object)
    per_class = {
        name: {
            "threshold": threshold,
            "accepted": int((names_N == name).sum()),
            "precision": _mean(is_correct[names_N == name]),
        }
        for name, threshold in decisions.thresholds_by_class().items()
    }
    return {
        "min_precision": decisions.min_precision,
        "accepted": accepted.num_rows,
        "review": pc.sum(is_ok).as_py() - accepted.num_rows,
        "accepted_share": accepted.num_rows / predictions.num_rows,
        "precision": _mean(is_correct),
        "per_class": per_class,
    }


def list_coverage(calibration: Calibration) -> list[tuple[float, float]]:
    """List precisions, descending, each with the share of the calibration's images that it accepts."""
    coverage = []
    for min_precision in sorted({*COVERAGE_GRID, *(1 - np.geomspace(0.005, 0.5, 40)).round(4).tolist()}, reverse=True):
        accepted = 0
        for curve in calibration.curves.values():
            threshold = find_threshold(curve, min_precision)
            accepted += 0 if threshold is None else curve.rank[curve.confidence.index(threshold)]
        coverage.append((min_precision, accepted / calibration.n))
    return coverage


def measure_coverage(confidence_N: FloatArray, correct_N: BoolArray) -> list[tuple[float, float]]:
    """List the precision of the surest rows, without a guarantee, each with their share of all rows."""
    order_N = np.argsort(-confidence_N, kind="stable")
    precision_N = np.cumsum(correct_N[order_N]) / np.arange(1, len(order_N) + 1)
    ranks = np.unique(np.linspace(1, len(order_N), MAX_COVERAGE_POINTS).round().astype(int))
    return [(float(precision_N[rank - 1]), rank / len(order_N)) for rank in ranks.tolist()]


def _mean(is_correct: npt.NDArray[np.bool_]) -> float | None:
    return float(is_correct.mean()) if len(is_correct) else None
