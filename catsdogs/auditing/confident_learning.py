"""Confident learning: which labels are suspect, by probabilities of models that were not trained on them.

Northcutt, Jiang and Chuang 2021, arXiv 1911.00068. Equal to `cleanlab.filter.find_label_issues` with
`filter_by="confident_learning"`, including its tolerance.

Shapes: N images, K classes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]
ProbArray = npt.NDArray[np.float64]
TOLERANCE = 1e-6  # cleanlab's, of comparisons of probabilities
MIN_THRESHOLD = 2e-6  # cleanlab's


class LabelQuality(NamedTuple):
    """How well labels agree with probabilities.

    Attributes:
        self_confidence_N: probability of the label; suspect labels come first in its order.
        suggested_N: for flagged labels the class that the confident joint counts the image for, else the most
            probable class.
        flagged_N: which images are off the diagonal of the confident joint.
    """

    self_confidence_N: ProbArray
    suggested_N: IndexArray
    flagged_N: npt.NDArray[np.bool_]


def rate_labels(labels_N: IndexArray, probs_NK: ProbArray) -> LabelQuality:
    """Compare labels with out-of-sample probabilities.

    The threshold of a class is the mean self-confidence of its images. An image is counted for the only class whose
    threshold its probability reaches; if there are several, for its most probable class; if there is none, it is not
    counted. It is flagged if that class is not its label, unless its label is the most probable class.

    Args:
        labels_N: index of each label. A class may have no label.
    """
    rows_N = np.arange(len(labels_N))
    self_confidence_N = probs_NK[rows_N, labels_N]
    is_confident_NK = probs_NK >= _compute_thresholds(labels_N, self_confidence_N, probs_NK.shape[1]) - TOLERANCE
    num_confident_N = is_confident_NK.sum(axis=1)
    most_probable_N = probs_NK.argmax(axis=1)
    counted_N = np.where(num_confident_N == 1, is_confident_NK.argmax(axis=1), most_probable_N)
    is_most_probable_N = self_confidence_N + TOLERANCE >= probs_NK.max(axis=1)
    flagged_N = (num_confident_N > 0) & (counted_N != labels_N) & ~is_most_probable_N
    return LabelQuality(self_confidence_N, np.where(flagged_N, counted_N, most_probable_N), flagged_N)


def _compute_thresholds(labels_N: IndexArray, self_confidence_N: ProbArray, num_classes: int) -> ProbArray:
    """Compute the mean self-confidence of each class, (K,); that of a class without images is infinite."""
    sums_K = np.bincount(labels_N, weights=self_confidence_N, minlength=num_classes)
    counts_K = np.bincount(labels_N, minlength=num_classes)
    means_K = np.divide(sums_K, counts_K, out=np.full(num_classes, np.inf), where=counts_K > 0)
    return np.asarray(np.maximum(means_K, MIN_THRESHOLD))
