"""The sections of the page. K classes, H height, W width."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catsdogs.metrics import find_best_epoch
from catsdogs.report.plots import plot_epochs, plot_histogram
from catsdogs.report.templates import Section, format_decimal, format_percent, render

_MAX_CLASSES = 30  # a wider matrix is unreadable
_MAX_PAIRS = 20
_MAX_LABELS = 25
_MAX_EXAMPLES = 50
# Columns of the table of epochs, with their decimal places.
_COLUMNS = {
    "train_loss": 4,
    "train_accuracy": 4,
    "val_loss": 4,
    "val_accuracy": 4,
    "lr": None,
    "images_per_s": 1,
    "seconds": 1,
}


def curves(history: Sequence[Mapping[str, float]]) -> Section:
    """Build the section with loss and accuracy by epoch, the best epoch marked, and a table of all numbers.

    Args:
        history: rows of `summary.csv`; a missing or non-finite value leaves a gap.
    """
    epochs = [int(row["epoch"]) for row in history]
    best_epoch = find_best_epoch(history)
    best = None if best_epoch is None else epochs.index(best_epoch)
    plots = []
    if history:
        plots = [_build_plot(history, "loss", best), _build_plot(history, "accuracy", best), _build_lr_plot(history)]
    rows = [
        (epoch, [_format_cell(row, column) for column in _COLUMNS]) for epoch, row in zip(epochs, history, strict=True)
    ]
    html = render("curves", plots=plots, columns=list(_COLUMNS), rows=rows, best=best)
    return Section(title="Training", html=html)


def _read_value(row: Mapping[str, float], column: str) -> float:
    value = float(row.get(column, math.nan))
    return value if math.isfinite(value) else math.nan


def _build_plot(history: Sequence[Mapping[str, float]], quantity: str, best: int | None) -> dict[str, object]:
    epochs = [int(row["epoch"]) for row in history]
    train, val = ([_read_value(row, f"{part}_{quantity}") for row in history] for part in ("train", "val"))
    alt = f"{quantity.capitalize()} over {len(epochs)} epochs. "
    alt += f"Training: {_describe_course(train)}. Validation: {_describe_course(val)}."
    return {
        "quantity": quantity.capitalize(),
        "svg": plot_epochs(epochs, train, val, best=best, top=1 if quantity == "accuracy" else None),
        "alt": alt,
        "best": "" if best is None else f"epoch {epochs[best]}: {format_decimal(val[best])}",
        "measured": not np.isnan(val).all(),
    }


def _build_lr_plot(history: Sequence[Mapping[str, float]]) -> dict[str, object]:
    epochs, rates = [int(row["epoch"]) for row in history], [_read_value(row, "lr") for row in history]
    alt = f"Learning rate at the end of each of {len(epochs)} epochs, from {rates[0]:.3g} to {rates[-1]:.3g}."
    svg = plot_epochs(epochs, rates, [math.nan] * len(epochs), best=None)
    return {"quantity": "Learning rate", "svg": svg, "alt": alt, "best": "", "measured": False}


def _describe_course(values: Sequence[float]) -> str:
    finite = [value for value in values if not math.isnan(value)]
    return f"from {format_decimal(finite[0])} to {format_decimal(finite[-1])}" if finite else "not measured"


def _format_cell(row: Mapping[str, float], column: str) -> str:
    value, places = _read_value(row, column), _COLUMNS[column]
    if places is None:
        return "–" if math.isnan(value) else f"{value:.3g}"
    return format_decimal(value, places)


def confusion_matrix(class_names: Sequence[str], matrix: ArrayLike, failed: Sequence[int] | None = None) -> Section:
    """Build the section with the matrix for up to 30 classes, else the most confused pairs, and metrics per class.

    Args:
        matrix: counts, int (K, K), rows true class, columns predicted class.
        failed: images of each true class that were not classified, (K,); they count as incorrect.
    """
    counts_KK = np.asarray(matrix, dtype=np.int64)
    num_classes = len(class_names)
    assert counts_KK.shape == (num_classes, num_classes), f"{counts_KK.shape} for {num_classes} classes"
    failed_K = np.zeros(num_classes, np.int64) if failed is None else np.asarray(failed, np.int64)
    small = num_classes <= _MAX_CLASSES
    html = render(
        "confusion",
        names=class_names,
        rows=_build_rows(counts_KK, failed_K) if small else [],
        pairs=[] if small else _find_pairs(class_names, counts_KK, failed_K),
        small=small,
        show_failed=bool(failed_K.any()),
        classes=_compute_metrics(class_names, counts_KK, failed_K, worst_first=not small),
    )
    return Section(title="Confusion", html=html)


def _build_rows(counts_KK: NDArray[np.int64], failed_K: NDArray[np.int64]) -> list[list[tuple[int, float]]]:
    """Return the count of each cell and its share of the true class; the last column counts failed images."""
    table = np.column_stack([counts_KK, failed_K]) if failed_K.any() else counts_KK
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    return [list(zip(*row, strict=True)) for row in zip(table.tolist(), shares.tolist(), strict=True)]


def _find_pairs(
    names: Sequence[str], counts_KK: NDArray[np.int64], failed_K: NDArray[np.int64]
) -> list[dict[str, object]]:
    confused_KK = counts_KK.copy()
    np.fill_diagonal(confused_KK, 0)
    order = np.argsort(-confused_KK, axis=None, kind="stable")[:_MAX_PAIRS]
    support_K = counts_KK.sum(axis=1) + failed_K
    return [
        {"true": names[t], "label": names[p], "count": int(n), "share": float(n / support_K[t])}
        for t, p in zip(*(axis.tolist() for axis in np.unravel_index(order, confused_KK.shape)), strict=True)
        if (n := confused_KK[t, p]) > 0
    ]


def _compute_metrics(
    names: Sequence[str], counts_KK: NDArray[np.int64], failed_K: NDArray[np.int64], *, worst_first: bool
) -> list[dict[str, object]]:
    hits_K, support_K = counts_KK.diagonal(), counts_KK.sum(axis=1) + failed_K
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
    """Divide; nan where the divisor is 0."""
    return np.where(whole_K > 0, part_K / np.maximum(whole_K, 1), np.nan)


def facts(values: Mapping[str, str]) -> Section:
    """Build a strip of key figures, such as `{"accuracy": "0.984", "images": "1,000"}`."""
    return Section(title="Key figures", html=render("facts", values=values))


def settings(values: Mapping[str, object]) -> Section:
    """Build the section with the settings of the run."""
    return Section(title="Settings", html=render("settings", values={k: _format_setting(v) for k, v in values.items()}))


def _format_setting(value: object) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def label_counts(by_label: Mapping[str, int]) -> Section:
    """Build the section with the number of images per predicted class, for the 25 most frequent classes."""
    return Section(title="Predicted classes", html=render("labels", **rank(by_label, _MAX_LABELS)))


def confidence(histogram: Sequence[int], edges: Sequence[float]) -> Section:
    """Build the section with a histogram of the predicted class's probability.

    Args:
        edges: bounds of the bins, ascending; one more than bins.
    """
    assert len(edges) == len(histogram) + 1, f"{len(edges)} edges for {len(histogram)} bins"
    total = int(sum(histogram))
    num_confident = sum(n for n, left in zip(histogram, edges, strict=False) if left > 0.9 - 1e-6)
    summary = f"{format_percent(num_confident / total)} at 0.9 or above" if total else ""
    svg = plot_histogram([int(n) for n in histogram], [float(edge) for edge in edges]) if total else ""
    return Section(title="Confidence", html=render("confidence", svg=svg, total=total, summary=summary))


def failures(
    by_status: Mapping[str, int], examples: Sequence[tuple[str, str, str]], done: str = "classified"
) -> Section:
    """Build the section with the reasons why images were not classified.

    Args:
        by_status: images by status; `ok` counts only towards the total.
        examples: path, status and error of failed images; the first 50 are shown.
        done: what happened to the other images.
    """
    ranked = rank({status: n for status, n in by_status.items() if status != "ok" and n}, len(by_status))
    listed = sum(by_status.values())
    html = render("failures", **ranked, listed=listed, examples=examples[:_MAX_EXAMPLES], done=done)
    return Section(title="Failures", html=html)


def rank(counts: Mapping[str, int], limit: int) -> dict[str, object]:
    """Rank the most frequent names, and count the further names and images."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    total, rest = sum(counts.values()), ordered[limit:]
    rows = [
        {"name": name, "count": n, "share": n / max(total, 1), "width": n / max(ordered[0][1], 1)}
        for name, n in ordered[:limit]
    ]
    return {"rows": rows, "total": total, "num_rest": len(rest), "rest": sum(n for _, n in rest)}
