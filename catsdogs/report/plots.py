"""Plots as inline SVG.

They use matplotlib's Figure, without pyplot, which has global state. Text stays text, in the page's font. Colours are
CSS variables of the page, so that plots follow its light and dark scheme. Equal input gives equal bytes.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

# matplotlib does not support CSS variables: it draws in these colours, which `_render_svg` replaces.
_MUTED, _RULE, _TRAIN, _VAL = "#0000a1", "#0000a2", "#0000a3", "#0000a4"
_VARIABLES = {_MUTED: "var(--muted)", _RULE: "var(--rule)", _TRAIN: "var(--train)", _VAL: "var(--accent)"}
Curve = tuple[Sequence[float], Sequence[float]]  # x and y of its points
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def plot_epochs(
    epochs: Sequence[float], train: Sequence[float], val: Sequence[float], *, best: int | None, top: float | None = None
) -> Markup:
    """Draw a training and a validation curve.

    Args:
        best: position in `epochs` to mark.
        top: the largest possible value, such as 1 for an accuracy.
    """
    figure, axes = _create_figure(4.4, 2.75)
    axes.plot(epochs, train, color=_TRAIN, linewidth=1.4, linestyle=(0, (4, 2)), marker=".")
    axes.plot(epochs, val, color=_VAL, linewidth=1.8, marker=".")
    if best is not None:
        axes.axvline(epochs[best], color=_MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.plot(epochs[best], val[best], "o", markersize=8, markerfacecolor="none", color=_VAL, clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    _set_limits(axes, epochs, top)
    return _render_svg(figure)


def _set_limits(axes: Axes, epochs: Sequence[float], top: float | None) -> None:
    first, last = min(epochs), max(epochs)
    margin = min(0.03 * (last - first), 0.9) or 0.5  # below 1: no tick at epoch 0
    axes.set_xlim(first - margin, last + margin)
    low, high = axes.get_ylim()
    low, high = (0, 1.15 * high) if first == last else (max(low, 0), high)
    axes.set_ylim(low, high if top is None else min(high, top * 1.01))


def plot_reliability(before: Curve, after: Curve) -> Markup:
    """Draw accuracy against confidence before and after calibration; on the diagonal they are equal.

    Args:
        before, after: confidence and accuracy of each bin.
    """
    figure, axes = _create_figure(4.4, 2.75)
    low = min(*before[0], *before[1], *after[0], *after[1])
    axes.axline((low, low), (1, 1), color=_MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    _plot_pair(axes, before, after, marker="o", markersize=4)
    axes.margins(0.04)
    return _render_svg(figure)


def plot_coverage(observed: Curve, guaranteed: Curve) -> Markup:
    """Draw precision against the share of accepted images.

    Args:
        observed, guaranteed: share and precision, by descending precision.
    """
    figure, axes = _create_figure(4.4, 2.75)
    _plot_pair(axes, observed, guaranteed)
    axes.set_xlim(-0.02, 1.02)
    return _render_svg(figure)


def _plot_pair(axes: Axes, first: Curve, second: Curve, **style: Any) -> None:
    """Draw two curves with the styles of the legend's first and second key."""
    axes.plot(*first, color=_TRAIN, linewidth=1.4, linestyle=(0, (4, 2)), **style)
    axes.plot(*second, color=_VAL, linewidth=1.8, **style)


def plot_histogram(counts: Sequence[int], edges: Sequence[float]) -> Markup:
    """Draw a histogram of bins between the ascending `edges`."""
    figure, axes = _create_figure(4.6, 2.2)
    axes.stairs(counts, edges, fill=True, color=_VAL)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.01)
    return _render_svg(figure)


def plot_shares(a: Sequence[float], b: Sequence[float] | None, edges: Sequence[float]) -> Markup:
    """Draw the shares of two sets in the bins between the ascending `edges`; the first is dashed."""
    figure, axes = _create_figure(4.6, 2.4)
    if b is not None:
        axes.stairs(b, edges, fill=True, color=_VAL, alpha=0.15)
        axes.stairs(b, edges, color=_VAL, linewidth=1.8)
        axes.stairs(a, edges, color=_TRAIN, linewidth=1.6, linestyle=(0, (4, 2)))
    else:
        axes.stairs(a, edges, fill=True, color=_VAL)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    return _render_svg(figure)


def _create_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, pad=5, labelsize=9, labelfontfamily="DejaVu Sans")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _render_svg(figure: Figure) -> Markup:
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "catsdogs"}):
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    drawn = file.getvalue()
    svg = drawn[drawn.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # The ids of all plots of a page must differ.
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg))
