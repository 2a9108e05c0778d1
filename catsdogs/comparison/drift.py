"""How two sets of images differ, whether or not they have images in common.

The population stability index (PSI) of a value is the sum over bins of (b - a) ln(b / a), with the shares a and b of
the images in a bin. By the usual rule, 0.1 is a small and 0.25 a large shift (Siddiqi, Credit Risk Scorecards, 2006).
Of two samples of one population, n and m images in c bins, the mean is about (c - 1) (1/n + 1/m) (Yurdakul,
Statistical Properties of Population Stability Index, Western Michigan University, 2018).

The bins of a number are those between the deciles of A, one below and one above A's values; equal deciles are one.
Every count is increased by EMPTY, so that a bin without images has a logarithm.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from catsdogs.results import OK_CODE, Rows

EMPTY = 0.5
NUM_QUANTILES = 10
NUM_BINS = 20  # of the histogram, from 0 to 1
MIN_VARIANCE = 1e-9  # relative to the mean square: less is rounding, of rows that are all equal
SIZES = ("width", "height", "size_bytes")
SHOWN_QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}

Floats = npt.NDArray[np.float64]


class Embeddings:
    """Mean and variance of the embeddings of a result."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._sum_D: Floats | None = None
        self._squares = 0.0

    def add(self, embeddings_ND: npt.NDArray[np.float32]) -> None:
        """Add rows."""
        if not len(embeddings_ND):
            return
        sum_D = embeddings_ND.sum(axis=0, dtype=np.float64)
        self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D
        self._squares += float(np.vdot(embeddings_ND, embeddings_ND.astype(np.float64)))
        self._num_rows += len(embeddings_ND)

    def compute_shift(self, other: "Embeddings") -> float | None:
        """Compute the distance of the two means, in standard deviations of this one's rows around their mean.

        None if one has no rows, or the rows do not differ.
        """
        if self._sum_D is None or other._sum_D is None or len(self._sum_D) != len(other._sum_D):
            return None
        mean_D = self._sum_D / self._num_rows
        variance = self._squares / self._num_rows - float(mean_D @ mean_D)
        distance = float(np.linalg.norm(mean_D - other._sum_D / other._num_rows))
        return distance / math.sqrt(variance) if variance > MIN_VARIANCE * self._squares / self._num_rows else None


def compute_psi(counts_a: npt.ArrayLike, counts_b: npt.ArrayLike) -> float | None:
    """Compute the population stability index of counts in the same bins; None if one has no images."""
    counts = np.array([counts_a, counts_b], np.float64)
    if not counts.sum(axis=1).all():
        return None
    a, b = (counts + EMPTY) / (counts + EMPTY).sum(axis=1, keepdims=True)
    return float(((b - a) * np.log(b / a)).sum())


def compute_psi_of_values(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float | None:
    """Compute the population stability index of numbers, in bins of A's deciles."""
    if not len(a) or not len(b):
        return None
    quantiles = np.quantile(a.astype(np.float64), np.linspace(0, 1, NUM_QUANTILES + 1))
    edges = np.unique([*quantiles[:-1], np.nextafter(quantiles[-1], np.inf)])
    counts = [np.bincount(np.searchsorted(edges, side, side="right"), minlength=len(edges) + 1) for side in (a, b)]
    return compute_psi(*counts)


def compute_psi_of_names(a: Mapping[str, int], b: Mapping[str, int]) -> float | None:
    """Compute the population stability index of names, each of which is a bin."""
    names = sorted(a.keys() | b.keys())
    return compute_psi([a.get(name, 0) for name in names], [b.get(name, 0) for name in names])


class ImageSet:
    """The images of one result, without their paths."""

    def __init__(self, rows: Rows, class_names: list[str], formats: Counter[str], embeddings: Embeddings) -> None:
        ok_N = rows["status"] == OK_CODE
        self._values = {name: rows[name][ok_N] for name in ("prob", *SIZES)}
        self.formats, self.embeddings = formats, embeddings
        counts_K = np.bincount(rows["label"][ok_N], minlength=len(class_names)).tolist()
        self.by_label = dict(zip(class_names, counts_K, strict=True))
        self.histogram: list[int] = np.histogram(self._values["prob"], NUM_BINS, (0, 1))[0].tolist()

    def compute_drift(self, other: "ImageSet") -> dict[str, float | None]:
        """Compute the figures of the difference between this set, A, and another, B."""
        psi = {name: compute_psi_of_values(values, other._values[name]) for name, values in self._values.items()}
        return {f"psi_{name}": psi[name] for name in SIZES} | {
            "psi": psi["prob"],
            "psi_label": compute_psi_of_names(self.by_label, other.by_label),
            "psi_format": compute_psi_of_names(self.formats, other.formats),
            "embedding_shift": self.embeddings.compute_shift(other.embeddings),
        }

    def summarize(self) -> dict[str, Any]:
        """Build the entries of `compare.json` about this set."""
        return {
            "by_label": {name: n for name, n in self.by_label.items() if n},
            "formats": dict(sorted(self.formats.items())),
            "sizes": {name: compute_quantiles(self._values[name]) for name in SIZES},
            "prob_histogram": self.histogram,
        }


def compute_quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    """Compute the quantiles that are shown; empty without values."""
    if not len(values):
        return {}
    quantiles: Iterable[float] = np.quantile(values, list(SHOWN_QUANTILES.values())).tolist()
    return dict(zip(SHOWN_QUANTILES, quantiles, strict=True))
