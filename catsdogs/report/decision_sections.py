"""The sections of the page about calibration and decisions."""

from collections.abc import Mapping, Sequence

from catsdogs.report.plots import Curve, plot_coverage, plot_reliability
from catsdogs.report.templates import Section, format_percent, render

_NAMED = (0.9, 0.95, 0.98, 0.99)  # precisions in the table
_MAX_CLASSES = 50
Coverage = Sequence[tuple[float, float]]  # precision, share of accepted images


def calibration(summary: str, before: Curve, after: Curve, observed: Coverage, guaranteed: Coverage) -> Section:
    """Build the section with reliability before and after calibration, and the accepted share by precision.

    Args:
        before, after: confidence and accuracy of each bin.
        observed: of the surest images, without a guarantee.
        guaranteed: of what `--min-precision` accepts, by descending precision.
    """
    named = [(precision, share) for precision, share in guaranteed if precision in _NAMED]
    highest = {share: precision for precision, share in reversed(guaranteed)}
    proven = [(precision, share) for share, precision in highest.items() if share > 0]
    curves = [([share for _, share in points], [precision for precision, _ in points]) for points in (observed, proven)]
    plots = [
        {
            "title": "Accuracy against confidence",
            "keys": ("before", "after"),
            "svg": plot_reliability(before, after),
            "alt": f"Accuracy against confidence. Before: {_describe(before)}. After: {_describe(after)}.",
        },
        {
            "title": "Precision against share accepted",
            "keys": ("observed", "with 95% confidence"),
            "svg": plot_coverage(*curves),
            "alt": "Precision against the share of accepted images, with 95% confidence: "
            + "; ".join(f"{precision:g} accepts {format_percent(share)}" for precision, share in named),
        },
    ]
    return Section(
        title="Calibration",
        html=render("calibration", summary=summary[:1].upper() + summary[1:], plots=plots, rows=named),
    )


def _describe(curve: Curve) -> str:
    points = ", ".join(f"{accuracy:.2f} at {confidence:.2f}" for confidence, accuracy in zip(*curve, strict=True))
    return points or "not measured"


def decision_counts(
    by_label: Mapping[str, int], by_decision: Mapping[str, int], thresholds: Mapping[str, float | None]
) -> Section:
    """Build the section with the accepted images, and those to review, of each predicted class.

    Args:
        by_decision: images accepted as each class; what is not accepted of `by_label` is to be reviewed.
        thresholds: of confidence; None for a class that is never accepted.
    """
    ordered = sorted(by_label, key=lambda name: -by_label[name])
    rows = [
        {"name": name, "threshold": thresholds[name], "accepted": accepted, "review": by_label[name] - accepted}
        for name in ordered
        for accepted in [by_decision.get(name, 0)]
    ]
    total = sum(by_label.values())
    accepted = sum(by_decision.get(name, 0) for name in by_label)
    share = format_percent(accepted / total) if total else ""
    html = render("decisions", rows=rows[:_MAX_CLASSES], num_rest=len(rows[_MAX_CLASSES:]), total=total, share=share)
    return Section(title="Decisions", html=html)
