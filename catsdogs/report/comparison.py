"""The sections of a comparison of two results, A and B."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from catsdogs.report.plots import plot_shares
from catsdogs.report.templates import Section, render

_MAX_CLASSES = 30  # a wider matrix is unreadable
_MAX_PAIRS = 20
_MAX_NAMES = 25

Matrix = Mapping[str, Mapping[str, int]]  # counts by A's name and B's


class PairedHistogram(NamedTuple):
    """Counts of A and B in equal bins from 0 to 1; of both together where `b` is None."""

    title: str
    a: Sequence[int]
    b: Sequence[int] | None


def flips(class_names: Sequence[str], matrix: Matrix) -> Section:
    """Build the section with A's labels in rows and B's in columns for up to 30 classes, else the most frequent flips.

    Args:
        matrix: images that both classified; absent counts are 0.
    """
    pairs = _rank_pairs(matrix)
    rows = [
        [(n, n / max(sum(row.values()), 1)) for n in _select(row, class_names)] for row in _rows(matrix, class_names)
    ]
    small = len(class_names) <= _MAX_CLASSES
    total = sum(sum(row.values()) for row in matrix.values())
    html = render(
        "flips",
        names=class_names,
        rows=rows if small else [],
        small=small,
        pairs=pairs[:_MAX_PAIRS],
        flipped=sum(n for _, _, n in pairs),
        total=total,
    )
    return Section(title="Labels", html=html)


def _rows(matrix: Matrix, names: Sequence[str]) -> list[Mapping[str, int]]:
    return [matrix.get(name, {}) for name in names]


def _select(row: Mapping[str, int], names: Sequence[str]) -> list[int]:
    return [row.get(name, 0) for name in names]


def _rank_pairs(matrix: Matrix) -> list[tuple[str, str, int]]:
    """Return the names of A and B that differ, with their counts, the most frequent first."""
    pairs = [(a, b, n) for a, row in matrix.items() for b, n in row.items() if a != b]
    return sorted(pairs, key=lambda pair: -pair[2])


def status_changes(matrix: Matrix) -> Section:
    """Build the section with the images whose status changed."""
    return Section(title="Status", html=render("status_changes", pairs=_rank_pairs(matrix)))


def largest_changes(rows: Sequence[Mapping[str, object]], total: int) -> Section:
    """Build the section with rows of `changes.parquet`, of `total`."""
    return Section(title="Largest changes", html=render("changes", rows=rows, total=total))


def paired_accuracy(
    figures: Mapping[str, float | None], recall: Mapping[str, Mapping[str, float]], only: tuple[int, int]
) -> Section:
    """Build the section with accuracy and recall of the images with a true label.

    Args:
        recall: of each class, `a`, `b` and the number of `images`; the largest drop is shown first.
        only: images that only A, and only B, classifies correctly.
    """
    ranked = sorted(recall.items(), key=lambda item: item[1]["b"] - item[1]["a"])
    total = sum(row["images"] for row in recall.values())
    html = render("paired_accuracy", figures=figures, rows=ranked, only=only, total=total)
    return Section(title="Accuracy", html=html)


def paired_histograms(histograms: Sequence[PairedHistogram]) -> Section:
    """Build the section with histograms side by side; those without images are left out."""
    plots = []
    for title, a, b in histograms:
        total_a, total_b = sum(a), None if b is None else sum(b)
        if not total_a or total_b == 0:
            continue
        shares_b = None if b is None else [n / sum(b) for n in b]
        svg = plot_shares([n / total_a for n in a], shares_b, np.linspace(0, 1, len(a) + 1).tolist())
        plots.append({"title": title, "svg": svg, "a": total_a, "b": total_b})
    return Section(title="Probabilities", html=render("paired_histograms", plots=plots))


def paired_shares(title: str, a: Mapping[str, int], b: Mapping[str, int]) -> Section:
    """Build the section with the shares of names in A and B, for the 25 whose shares differ most."""
    totals = [max(sum(side.values()), 1) for side in (a, b)]
    shares = {name: (a.get(name, 0) / totals[0], b.get(name, 0) / totals[1]) for name in a.keys() | b.keys()}
    ranked = sorted(shares.items(), key=lambda item: (-abs(item[1][0] - item[1][1]), item[0]))
    rest = len(ranked) - _MAX_NAMES
    html = render("paired_shares", rows=ranked[:_MAX_NAMES], num_rest=max(rest, 0), title=title)
    return Section(title=title, html=html)


def paired_sizes(
    a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]], figures: Mapping[str, float | None]
) -> Section:
    """Build the section with quantiles of sizes, and their population stability index `psi_NAME`."""
    rows = [(name, a[name], b[name], figures[f"psi_{name}"]) for name in a if a[name] and b[name]]
    return Section(title="Sizes", html=render("paired_sizes", rows=rows))
