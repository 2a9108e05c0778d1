"""Sections of names and numbers: key figures, settings, labels, confidence, failures."""

from collections.abc import Mapping, Sequence

from catsdogs.report.plots import bars
from catsdogs.report.section import Section, percent, render

_MAX_LABELS = 25
_MAX_EXAMPLES = 50


def facts(values: Mapping[str, str]) -> Section:
    """Show a strip of key figures, e.g. `{"accuracy": "0.984", "images": "1,000"}`."""
    return Section(title="Key figures", html=render("facts", values=values))


def settings(values: Mapping[str, object]) -> Section:
    """Show the settings of the run."""
    return Section(title="Settings", html=render("settings", values={k: _written(v) for k, v in values.items()}))


def _written(value: object) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def label_counts(by_label: Mapping[str, int]) -> Section:
    """Show how many images got each label, the 25 most frequent ones by name."""
    return Section(title="Labels", html=render("labels", **_ranked(by_label, _MAX_LABELS)))


def confidence(histogram: Sequence[int], edges: Sequence[float]) -> Section:
    """Show a histogram of the winning probability.

    Args:
        edges: Bounds of the bins, ascending, one more than bins.
    """
    assert len(edges) == len(histogram) + 1, f"{len(edges)} edges for {len(histogram)} bins"
    total = int(sum(histogram))
    sure = sum(n for n, left in zip(histogram, edges, strict=False) if left > 0.9 - 1e-6)
    summary = f"{percent(sure / total)} at 0.9 or above" if total else ""
    svg = bars([int(n) for n in histogram], [float(edge) for edge in edges]) if total else ""
    return Section(title="Confidence", html=render("confidence", svg=svg, total=total, summary=summary))


def failures(by_status: Mapping[str, int], examples: Sequence[tuple[str, str, str]]) -> Section:
    """Show why images have no label.

    Args:
        by_status: Images by status; `ok` counts in the total only.
        examples: Path, status and error of some of them; the first 50 are shown.
    """
    ranked = _ranked({status: n for status, n in by_status.items() if status != "ok" and n}, len(by_status))
    listed = sum(by_status.values())
    return Section(
        title="Failures",
        html=render("failures", **ranked, listed=listed, examples=examples[:_MAX_EXAMPLES]),
    )


def _ranked(counts: Mapping[str, int], limit: int) -> dict[str, object]:
    """Return the most frequent names, and how many names and images are left."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    total, rest = sum(counts.values()), ordered[limit:]
    rows = [
        {"name": name, "count": n, "share": n / max(total, 1), "width": n / max(ordered[0][1], 1)}
        for name, n in ordered[:limit]
    ]
    return {"rows": rows, "total": total, "num_rest": len(rest), "rest": sum(n for _, n in rest)}
