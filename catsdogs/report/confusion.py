"""Which classes are taken for which, and the quality of each. K classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catsdogs.report.section import Section, render

_MAX_CLASSES = 30  # a wider matrix says nothing at a glance
_MAX_PAIRS = 20


def confusion_matrix(class_names: Sequence[str], matrix: ArrayLike, unlabelled: Sequence[int] | None = None) -> Section:
    """Show the counts up to 30 classes, the most confused pairs above, and the quality of each class.

    Args:
        matrix: Counts, int (K, K): true class by predicted class.
        unlabelled: Images of each true class without a prediction, (K,); they count as wrong.
    """
    counts_KK = np.asarray(matrix, dtype=np.int64)
    num_classes = len(class_names)
    assert counts_KK.shape == (num_classes, num_classes), f"{counts_KK.shape} for {num_classes} classes"
    missing_K = np.zeros(num_classes, np.int64) if unlabelled is None else np.asarray(unlabelled, np.int64)
    small = num_classes <= _MAX_CLASSES
    html = render(
        "confusion",
        names=class_names,
        rows=_rows(counts_KK, missing_K) if small else [],
        pairs=[] if small else _pairs(class_names, counts_KK, missing_K),
        small=small,
        show_missing=bool(missing_K.any()),
        classes=_quality(class_names, counts_KK, missing_K, worst_first=not small),
    )
    return Section(title="Confusion", html=html)


def _rows(counts_KK: NDArray[np.int64], missing_K: NDArray[np.int64]) -> list[list[tuple[int, float]]]:
    """Return each cell's count and its share of the true class, last the unlabelled ones if there are any."""
    table = np.column_stack([counts_KK, missing_K]) if missing_K.any() else counts_KK
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    return [list(zip(*row, strict=True)) for row in zip(table.tolist(), shares.tolist(), strict=True)]


def _pairs(names: Sequence[str], counts_KK: NDArray[np.int64], missing_K: NDArray[np.int64]) -> list[dict[str, object]]:
    wrong_KK = counts_KK.copy()
    np.fill_diagonal(wrong_KK, 0)
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:_MAX_PAIRS]
    support_K = counts_KK.sum(axis=1) + missing_K
    return [
        {"true": names[t], "label": names[p], "count": int(n), "share": float(n / support_K[t])}
        for t, p in zip(*(axis.tolist() for axis in np.unravel_index(order, wrong_KK.shape)), strict=True)
        if (n := wrong_KK[t, p]) > 0
    ]


def _quality(
    names: Sequence[str], counts_KK: NDArray[np.int64], missing_K: NDArray[np.int64], *, worst_first: bool
) -> list[dict[str, object]]:
    hits_K, support_K = counts_KK.diagonal(), counts_KK.sum(axis=1) + missing_K
    predicted_K = counts_KK.sum(axis=0)
    f1_K = _ratio(2 * hits_K, support_K + predicted_K)
    columns = {
        "name": list(names),
        "support": support_K.tolist(),
        "precision": _ratio(hits_K, predicted_K).tolist(),
        "recall": _ratio(hits_K, support_K).tolist(),
        "f1": f1_K.tolist(),
    }
    order = np.argsort(f1_K, kind="stable") if worst_first else np.arange(len(names))
    return [{key: values[i] for key, values in columns.items()} for i in order.tolist()]


def _ratio(part_K: NDArray[np.int64], whole_K: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide; nan where there is nothing to divide by."""
    return np.where(whole_K > 0, part_K / np.maximum(whole_K, 1), np.nan)
