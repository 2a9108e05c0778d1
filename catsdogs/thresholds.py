"""The lowest confidence at which the precision of a class is at least P, with 95% confidence.

A threshold is tested with the one-sided Clopper-Pearson bound of the precision of all predictions that are at least as
sure. Thresholds are tested from the surest down, each at the full level while the tests before it succeed: fixed
sequence testing (Bauer, Statistics in Medicine 10, 1991). Angelopoulos et al., Learn then Test, arXiv 2110.01052, use
it, also with several starts, to choose a threshold of a model.

A sequence that starts at the surest prediction ends there, since one prediction proves nothing; one that starts where
a rejection is first possible (59 correct predictions for P = 0.95) ends at a single early mistake. So there are several
starts, at ranks that double, which depend on P and the number of predictions only. They share the level equally. If no
test fails from one start to the next, its level adds to that of the next: the fallback procedure (Wiens, Pharmaceutical
Statistics 2, 2003), which accepts more than independent starts. The chance that a threshold is chosen whose precision
is below P is at most 5% for each class.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.05  # the chance that the precision above a threshold is below P
MAX_MISSING = 1 << 40  # images; P is closer to 1 than any data set can show

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PrecisionCurve:
    """The mistakes among the surest predictions of one class. Equal confidences are one step.

    Each step counts the predictions that are at least as sure. Of several steps in a row with the same number of
    mistakes only the first and the last are there: the first has the largest p-value. So the size depends on the number
    of mistakes.

    Attributes:
        rank: number of predictions, ascending.
        mistakes: how many of them are incorrect.
        confidence: the lowest confidence of them, a float32.
    """

    rank: tuple[int, ...] = ()
    mistakes: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()

    @property
    def num_predictions(self) -> int:
        """Number of predictions of the class."""
        return self.rank[-1] if self.rank else 0

    def prepend_correct(self, num_predictions: int) -> "PrecisionCurve":
        """Add correct predictions that are surer than all others."""
        if not num_predictions:
            return self
        rank = (num_predictions, *(rank + num_predictions for rank in self.rank))
        return PrecisionCurve(rank, (0, *self.mistakes), (1.0, *self.confidence))


def build_curve(confidence_N: FloatArray, correct_N: BoolArray) -> PrecisionCurve:
    """Count the mistakes among the surest of N predictions of a class."""
    if not len(confidence_N):
        return PrecisionCurve()
    order_N = np.argsort(-confidence_N, kind="stable")
    confidence_N, mistakes_N = confidence_N[order_N], np.cumsum(~correct_N[order_N])
    ends = np.flatnonzero(np.append(confidence_N[1:] != confidence_N[:-1], True))
    changes = np.diff(mistakes_N[ends]) > 0
    ends = ends[np.append(True, changes) | np.append(changes, True)]
    # The shortest text of a float32, not of the float64 that equals it.
    confidence = tuple(float(str(value)) for value in confidence_N[ends])
    return PrecisionCurve(tuple((ends + 1).tolist()), tuple(mistakes_N[ends].tolist()), confidence)


def parse_curve(value: Mapping[str, Any]) -> PrecisionCurve:
    """Read a curve from JSON; raises ValueError, TypeError, KeyError or OverflowError if it is none."""
    rank, mistakes, confidence = (np.array(value[name]) for name in ("rank", "mistakes", "confidence"))
    if not rank.ndim == mistakes.ndim == confidence.ndim == 1 or not len(rank) == len(mistakes) == len(confidence):
        raise ValueError("expected lists of one length")
    if not len(rank):
        return PrecisionCurve()
    is_curve = (
        rank.dtype.kind == mistakes.dtype.kind == "i"
        and confidence.dtype.kind in "if"
        and (np.diff(rank, prepend=0) > 0).all()
        and (np.diff(mistakes, prepend=0) >= 0).all()
        and (mistakes <= rank).all()
        and (np.diff(confidence) < 0).all()
        and 0 <= confidence[-1] <= confidence[0] <= 1
    )
    if not is_curve:
        raise ValueError("expected ascending ranks and mistakes, and descending confidences")
    return PrecisionCurve(tuple(rank.tolist()), tuple(mistakes.tolist()), tuple(map(float, confidence.tolist())))


def list_starts(num_predictions: int, min_precision: float) -> list[int]:
    """List the ranks at which tests start: the first at which one can succeed at its share of the level, doubling."""
    num_starts = 1
    while _find_first_rank(min_precision, num_starts + 1) << num_starts <= num_predictions:
        num_starts += 1
    first = _find_first_rank(min_precision, num_starts)
    return [first << i for i in range(num_starts)]


def _find_first_rank(min_precision: float, num_starts: int) -> int:
    """Find how many predictions without a mistake succeed at a share of the level."""
    return math.ceil(math.log(LEVEL / num_starts) / math.log(min_precision))


def find_threshold(curve: PrecisionCurve, min_precision: float) -> float | None:
    """Find the lowest confidence at which the precision is at least `min_precision`; None if none is proven."""
    from scipy.special import bdtr  # not at the top: takes half a second

    starts = list_starts(curve.num_predictions, min_precision)
    rank, mistakes = np.array(curve.rank, np.int64), np.array(curve.mistakes, np.int64)
    level, threshold = 0.0, None
    for start, end in itertools.pairwise([*starts, curve.num_predictions + 1]):
        level += LEVEL / len(starts)
        first = int(np.searchsorted(rank, start))
        if first == len(rank):
            break
        steps = slice(first, max(int(np.searchsorted(rank, end)), first + 1))
        tested = rank[steps].copy()
        if mistakes[first] == (mistakes[first - 1] if first else 0):
            tested[0] = start  # the steps between have the same number of mistakes, and are not stored
        failed = np.flatnonzero(bdtr(mistakes[steps].astype(float), tested, 1 - min_precision) > level)
        num_proven = int(failed[0]) if len(failed) else len(tested)
        if num_proven:
            threshold = curve.confidence[first + num_proven - 1]
        if len(failed):
            level = 0.0
    return threshold


def count_missing(curve: PrecisionCurve, min_precision: float) -> int:
    """Count how many further predictions without a mistake, surer than all others, would give a threshold."""
    high = 1
    while high < MAX_MISSING and find_threshold(curve.prepend_correct(high), min_precision) is None:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if find_threshold(curve.prepend_correct(middle), min_precision) is None:
            low = middle
        else:
            high = middle
    return high
