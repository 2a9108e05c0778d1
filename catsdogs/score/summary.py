"""The summary and the report of a scoring."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.schema import OK
from catsdogs.score.audit import Totals
from catsdogs.score.parts import NUM_BINS
from catsdogs.score.plan import REPORT, Plan

PACKAGES = ("catsdogs", "ray", "torch", "torchvision", "pyarrow", "pillow")


def summarize_rows(plan: Plan, totals: Totals, class_names: Sequence[str]) -> dict[str, Any]:
    """Make the part of `_summary.json` that the files alone give."""
    return {
        "listed": plan.num_files,
        "rows": totals.rows,
        "by_status": dict(sorted(totals.by_status.items())),
        "by_label": {name: totals.by_label.get(name, 0) for name in class_names},
        "unlisted": plan.unlisted,
    }


def summarize_costs(scored: int, seconds: float, retries: int, stage_s: Mapping[str, float]) -> dict[str, Any]:
    """Make the part of `_summary.json` that tells of the last command alone.

    Args:
        stage_s: seconds that each stage was at work, by the number of processes it had; the largest one limits.
    """
    return {
        "scored": scored,
        "images_per_s": round(scored / seconds, 2),
        "seconds": round(seconds, 2),
        "retries": retries,
        "stage_seconds": {stage: round(value, 2) for stage, value in stage_s.items()},
        "limited_by": max(stage_s, key=lambda stage: stage_s[stage]),
    }


def versions() -> dict[str, str]:
    """Name the versions of what labelled."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def write_report(config: ScoreConfig, summary: dict[str, Any], totals: Totals) -> None:
    """Write `_report.html`."""
    from catsdogs import report  # not above: matplotlib would take a second of every start

    facts = {
        "images": f"{summary['rows']:,}",
        "labelled": f"{summary['by_status'].get(OK, 0):,}",
        "img/s": f"{summary['images_per_s']:.1f}",
        "seconds": f"{summary['seconds']:,.0f}",
    }
    settings = {"input": config.input, "checkpoint": config.checkpoint, "output": config.output}
    sections = [
        report.facts(facts),
        report.label_counts(summary["by_label"]),
        report.confidence(totals.histogram, np.linspace(0, 1, NUM_BINS + 1).tolist()),
        report.failures(summary["by_status"], totals.examples),
        report.settings(settings | {"model_sha256": summary["model_sha256"]}),
    ]
    page = report.page("Scoring", sections, subtitle=config.input)
    storage.write_bytes(storage.join(config.output, REPORT), page.encode())
