"""Numbers -> SVG to stand inside the page.

Drawn through matplotlib's Figure, without pyplot, so it is safe in any process. Text stays text in
the page's font; colours are the page's CSS variables, so plots follow light and dark. Equal numbers
give equal bytes.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# matplotlib knows no CSS variables: it draws in these colours, which `_svg` then replaces.
_MUTED, _RULE, _TRAIN, _VAL = "#0000a1", "#0000a2", "#0000a3", "#0000a4"
_VARIABLES = {_MUTED: "var(--muted)", _RULE: "var(--rule)", _TRAIN: "var(--train)", _VAL: "var(--accent)"}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_MANY_EPOCHS = 25  # more markers than this hide the line


def epoch_lines(
    epochs: Sequence[float],
    train: Sequence[float],
    val: Sequence[float],
    *,
    best: int | None,
    top: float | None = None,
) -> Markup:
    """Draw a training and a validation curve.

    Args:
        best: Position in `epochs` to mark.
        top: The largest value that is possible, e.g. 1 for an accuracy.
    """
    figure, axes = _figure(4.4, 2.75)
    marker = "o" if len(epochs) <= _MANY_EPOCHS else ""
    axes.plot(epochs, train, color=_TRAIN, linewidth=1.4, linestyle=(0, (4, 2)), marker=marker, markersize=2.5)
    axes.plot(epochs, val, color=_VAL, linewidth=1.8, marker=marker, markersize=3.5)
    if best is not None:
        axes.axvline(epochs[best], color=_MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.plot(epochs[best], val[best], "o", markersize=8, markerfacecolor="none", color=_VAL, clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    _limit(axes, epochs, top)
    return _svg(figure)


def _limit(axes: Axes, epochs: Sequence[float], top: float | None) -> None:
    first, last = min(epochs), max(epochs)
    margin = min(0.03 * (last - first), 0.9) or 0.5  # below 1: no tick at epoch 0
    axes.set_xlim(first - margin, last + margin)
    low, high = axes.get_ylim()
    low, high = (0, 1.15 * high) if first == last else (max(low, 0), high)
    axes.set_ylim(low, high if top is None else min(high, top * 1.01))


def bars(counts: Sequence[int], edges: Sequence[float]) -> Markup:
    """Draw a histogram.

    Args:
        edges: One more than `counts`, ascending.
    """
    figure, axes = _figure(4.6, 2.2)
    bins = list(pairwise(edges))
    axes.bar(
        [(left + right) / 2 for left, right in bins],
        counts,
        width=[0.92 * (right - left) for left, right in bins],
        color=_VAL,
    )
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.01)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, pad=5, labelsize=9, labelfontfamily="DejaVu Sans")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _svg(figure: Figure) -> Markup:
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "catsdogs"}):
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    drawn = file.getvalue()
    svg = drawn[drawn.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Several plots share a page: their ids must differ.
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg))
