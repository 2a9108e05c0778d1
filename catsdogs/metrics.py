"""Classification metrics from sums that can be added over workers.

K classes, N rows. A file that is not classified counts as incorrect.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.schema import OK

MIN_PROB = 1e-15  # keeps the logarithm finite


@dataclass(frozen=True)
class MetricSums:
    """The sums that metrics are computed from.

    Attributes:
        matrix_KK: int64, rows true class, columns predicted class.
        failed_K: int64, files of each class that are not classified.
        loss: cross-entropy summed over the classified rows.
    """

    matrix_KK: np.ndarray[Any, np.dtype[np.int64]]
    failed_K: np.ndarray[Any, np.dtype[np.int64]]
    loss: float

    @classmethod
    def from_predictions(cls, predictions: pa.Table, class_names: Sequence[str]) -> "MetricSums":
        """Sum over predictions, which must all have a true label."""
        K = len(class_names)
        index_by_name = {name: i for i, name in enumerate(class_names)}
        true_N = np.array([index_by_name[name] for name in predictions["true_label"].to_pylist()], dtype=np.int64)
        ok_N = np.array([status == OK for status in predictions["status"].to_pylist()], dtype=bool)
        index_N = predictions["index"].fill_null(0).to_numpy()[ok_N]
        matrix_KK = np.bincount(true_N[ok_N] * K + index_N, minlength=K * K).reshape(K, K)
        prob_N = select_true_probs(predictions.filter(pa.array(ok_N)), true_N[ok_N])
        loss = -math.fsum(np.log(np.maximum(prob_N, MIN_PROB)))
        return cls(matrix_KK, np.bincount(true_N[~ok_N], minlength=K), loss)

    @classmethod
    def from_vector(cls, vector: np.ndarray[Any, np.dtype[np.float64]], num_classes: int) -> "MetricSums":
        """Build the sums from the result of `vector`."""
        counts = vector[:-1].astype(np.int64)
        K = num_classes
        return cls(counts[: K * K].reshape(K, K), counts[K * K :], float(vector[-1]))

    def vector(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the sums as one float64 vector for an all-reduce; counts stay exact up to 2**53."""
        return np.concatenate([self.matrix_KK.ravel(), self.failed_K, [self.loss]]).astype(np.float64)

    @property
    def num_classified(self) -> int:
        """Number of classified rows."""
        return int(self.matrix_KK.sum())

    @property
    def num_failed(self) -> int:
        """Number of rows that are not classified."""
        return int(self.failed_K.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of all rows that are correct."""
        total = self.num_classified + self.num_failed
        return float(np.trace(self.matrix_KK) / total) if total else math.nan

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy of the classified rows."""
        return self.loss / self.num_classified if self.num_classified else math.nan


def select_true_probs(predictions: pa.Table, true_N: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Select the probability of each classified row's true class, float64 (N,)."""
    if not len(true_N):
        return np.zeros(0)
    probs = predictions["probs"].combine_chunks()
    probs_NK = probs.flatten().to_numpy().reshape(len(true_N), -1).astype(np.float64)
    return np.asarray(probs_NK[np.arange(len(true_N)), true_N])


def compute_metrics(predictions: pa.Table, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute the content of `metrics.json`."""
    sums = MetricSums.from_predictions(predictions, class_names)
    total = sums.num_classified + sums.num_failed
    num_correct = int(np.trace(sums.matrix_KK))
    return {
        "accuracy": sums.accuracy,
        "accuracy_interval_95": list(wilson_interval(num_correct, total)),
        "log_loss": sums.mean_loss if sums.num_classified else None,
        "roc_auc": _binary_auc(predictions, class_names) if len(class_names) == 2 else None,
        "n": total,
        "failed": sums.num_failed,
        "per_class": per_class(sums, class_names),
        "class_names": list(class_names),
        "confusion_matrix": sums.matrix_KK.tolist(),
        "failed_by_class": sums.failed_K.tolist(),
    }


def compute_group_metrics(predictions: pa.Table, groups: pa.ChunkedArray) -> dict[str, Any]:
    """Compute the mean accuracy of groups, such as videos, of which each counts the same whatever its length.

    The interval is Wilson's of as many images as there are groups. It is rather too wide: a fraction varies less than a
    single image that is correct or not.

    Args:
        groups: of each row; one without a group is a separate group.
    """
    is_correct = pc.equal(predictions["label"], predictions["true_label"]).fill_null(False).cast(pa.float64())
    rows = pa.table({"group": groups, "is_correct": is_correct})
    is_grouped = rows["group"].is_valid()
    by_group = rows.filter(is_grouped).group_by("group").aggregate([("is_correct", "mean")])["is_correct_mean"]
    separate = rows.filter(pc.invert(is_grouped))["is_correct"]
    total = len(by_group) + len(separate)
    num_correct = math.fsum(by_group.to_pylist()) + math.fsum(separate.to_pylist())
    return {
        "groups": total,
        "group_accuracy": num_correct / total,
        "group_accuracy_interval_95": list(wilson_interval(num_correct, total)),
    }


def per_class(sums: MetricSums, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compute precision, recall, F1 and support of each class; 0 where the denominator is 0."""
    hits_K = np.diag(sums.matrix_KK)
    predicted_K = sums.matrix_KK.sum(axis=0)
    support_K = sums.matrix_KK.sum(axis=1) + sums.failed_K
    rows = {}
    for name, hits, predicted, support in zip(class_names, hits_K, predicted_K, support_K, strict=True):
        rows[name] = {
            "precision": float(hits / predicted) if predicted else 0.0,
            "recall": float(hits / support) if support else 0.0,
            "f1": float(2 * hits / (predicted + support)) if predicted + support else 0.0,
            "support": int(support),
        }
    return rows


def wilson_interval(num_correct: float, total: int) -> tuple[float, float]:
    """Compute the 95% confidence interval of a fraction (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if not total:
        return 0.0, 1.0
    z = 1.959964
    fraction = num_correct / total
    centre = (fraction + z * z / (2 * total)) / (1 + z * z / total)
    spread = z * math.sqrt(num_correct * (total - num_correct) / total + z * z / 4) / (total + z * z)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _binary_auc(predictions: pa.Table, class_names: Sequence[str]) -> float | None:
    """Compute ROC AUC as Mann-Whitney U of the second class's probability; ties count half."""
    classified = predictions.filter(pa.array([status == OK for status in predictions["status"].to_pylist()]))
    positive_N = np.array([name == class_names[1] for name in classified["true_label"].to_pylist()], dtype=bool)
    if positive_N.all() or not positive_N.any():
        return None
    score_N = select_true_probs(classified, np.ones(len(positive_N), dtype=np.int64))
    _, inverse, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_positive = int(positive_N.sum())
    u = rank_N[positive_N].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * (len(positive_N) - num_positive)))


def find_best_epoch(history: Sequence[Mapping[str, float]]) -> int | None:
    """Find the epoch of highest validation accuracy, then lowest loss, then the first, in rows of `summary.csv`."""

    def rank(row: Mapping[str, float]) -> tuple[float, float]:
        loss = row.get("val_loss", math.nan)
        return row["val_accuracy"], -loss if math.isfinite(loss) else -math.inf

    measured = [row for row in history if math.isfinite(row.get("val_accuracy", math.nan))]
    return int(max(measured, key=rank)["epoch"]) if measured else None
