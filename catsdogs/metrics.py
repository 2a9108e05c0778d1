"""Exact sums over all workers -> numbers. K classes; a file without a label counts as wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from catsdogs.schema import OK

MIN_PROB = 1e-15  # keeps the logarithm finite


@dataclass(frozen=True)
class MetricSums:
    """What every number is made of; adding two gives the sums over both sets of rows.

    Attributes:
        matrix_KK: int64, rows true class, columns predicted class.
        failed_K: int64, files of a class without a label.
        loss: float64, cross-entropy summed over the labelled rows.
    """

    matrix_KK: np.ndarray[Any, np.dtype[np.int64]]
    failed_K: np.ndarray[Any, np.dtype[np.int64]]
    loss: float

    @classmethod
    def from_predictions(cls, predictions: pa.Table, class_names: Sequence[str]) -> "MetricSums":
        """Sum over predictions of which every row has a true label."""
        K = len(class_names)
        position = {name: i for i, name in enumerate(class_names)}
        true_N = np.array([position[name] for name in predictions["true_label"].to_pylist()], dtype=np.int64)
        ok_N = np.array([status == OK for status in predictions["status"].to_pylist()], dtype=bool)
        index_N = predictions["index"].fill_null(0).to_numpy()[ok_N]
        matrix_KK = np.bincount(true_N[ok_N] * K + index_N, minlength=K * K).reshape(K, K)
        prob_N = true_probs(predictions.filter(pa.array(ok_N)), true_N[ok_N])
        loss = -math.fsum(np.log(np.maximum(prob_N, MIN_PROB)))
        return cls(matrix_KK, np.bincount(true_N[~ok_N], minlength=K), loss)

    @classmethod
    def from_vector(cls, vector: np.ndarray[Any, np.dtype[np.float64]], num_classes: int) -> "MetricSums":
        """Undo `vector`."""
        counts = vector[:-1].astype(np.int64)
        K = num_classes
        return cls(counts[: K * K].reshape(K, K), counts[K * K :], float(vector[-1]))

    def vector(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Lay the sums out as float64, which holds counts exactly, for one all-reduce."""
        return np.concatenate([self.matrix_KK.ravel(), self.failed_K, [self.loss]]).astype(np.float64)

    @property
    def num_labelled(self) -> int:
        """Rows with a label."""
        return int(self.matrix_KK.sum())

    @property
    def num_failed(self) -> int:
        """Rows without one."""
        return int(self.failed_K.sum())

    @property
    def accuracy(self) -> float:
        """Share of all rows that are right."""
        total = self.num_labelled + self.num_failed
        return float(np.trace(self.matrix_KK) / total) if total else math.nan

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy of the labelled rows."""
        return self.loss / self.num_labelled if self.num_labelled else math.nan


def true_probs(predictions: pa.Table, true_N: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Take each labelled row's probability of its true class, float64 (N,)."""
    if not len(true_N):
        return np.zeros(0)
    probs = predictions["probs"].combine_chunks()
    probs_NK = probs.flatten().to_numpy().reshape(len(true_N), -1).astype(np.float64)
    return np.asarray(probs_NK[np.arange(len(true_N)), true_N])


def compute_metrics(predictions: pa.Table, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute every number of `metrics.json`."""
    sums = MetricSums.from_predictions(predictions, class_names)
    total = sums.num_labelled + sums.num_failed
    right = int(np.trace(sums.matrix_KK))
    return {
        "accuracy": sums.accuracy,
        "accuracy_interval_95": list(wilson_interval(right, total)),
        "log_loss": sums.mean_loss if sums.num_labelled else None,
        "roc_auc": _binary_auc(predictions, class_names) if len(class_names) == 2 else None,
        "n": total,
        "failed": sums.num_failed,
        "per_class": per_class(sums, class_names),
        "class_names": list(class_names),
        "confusion_matrix": sums.matrix_KK.tolist(),
        "failed_by_class": sums.failed_K.tolist(),
    }


def per_class(sums: MetricSums, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compute precision, recall, F1 and support of each class; 0 where nothing was predicted."""
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


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Bound a share with 95% confidence (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if not total:
        return 0.0, 1.0
    z = 1.959964
    share, spread = (
        right / total,
        z * math.sqrt(right * (total - right) / total + z * z / 4) / (total + z * z),
    )
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _binary_auc(predictions: pa.Table, class_names: Sequence[str]) -> float | None:
    """Rank the labelled rows by the second class's probability (Mann-Whitney U); ties count half."""
    labelled = predictions.filter(pa.array([status == OK for status in predictions["status"].to_pylist()]))
    positive = np.array([name == class_names[1] for name in labelled["true_label"].to_pylist()], dtype=bool)
    if positive.all() or not positive.any():
        return None
    score = true_probs(labelled, np.ones(len(positive), dtype=np.int64))
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    del values
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_positive = int(positive.sum())
    u = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * (len(positive) - num_positive)))
