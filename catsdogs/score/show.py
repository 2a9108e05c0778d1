"""The summary and the report of a scoring."""

import platform
from importlib.metadata import version
from typing import Any

import numpy as np

from catsdogs import report, storage
from catsdogs.checkpoint import Checkpoint
from catsdogs.config import ScoreConfig
from catsdogs.schema import OK
from catsdogs.score.plan import Plan
from catsdogs.score.write import NUM_BINS, REPORT, PartWriter

PACKAGES = ("catsdogs", "ray", "torch", "torchvision", "pyarrow", "pillow")


def summarize(plan: Plan, writer: PartWriter, model: Checkpoint, seconds: float) -> dict[str, Any]:
    """Make the content of `_summary.json`."""
    return {
        "listed": plan.num_files,
        "rows": writer.num_rows,
        "by_status": dict(sorted(writer.by_status.items())),
        "by_label": {name: writer.by_label.get(name, 0) for name in model.class_names},
        "unlisted": plan.unlisted,
        "images_per_s": round(writer.num_rows / seconds, 2),
        "seconds": round(seconds, 2),
        "model_sha256": model.sha256,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def report_sections(summary: dict[str, Any], writer: PartWriter) -> list[report.Section]:
    """Build the sections of a scoring's page."""
    facts = {
        "images": f"{summary['rows']:,}",
        "labelled": f"{summary['by_status'].get(OK, 0):,}",
        "img/s": f"{summary['images_per_s']:.1f}",
        "seconds": f"{summary['seconds']:,.0f}",
    }
    return [
        report.facts(facts),
        report.label_counts(summary["by_label"]),
        report.confidence(writer.histogram.tolist(), np.linspace(0, 1, NUM_BINS + 1).tolist()),
        report.failures(summary["by_status"], writer.examples),
    ]


def write_report(config: ScoreConfig, summary: dict[str, Any], writer: PartWriter) -> None:
    """Write `_report.html`."""
    settings = {"input": config.input, "checkpoint": config.checkpoint, "output": config.output}
    sections = [
        *report_sections(summary, writer),
        report.settings(settings | {"model_sha256": summary["model_sha256"]}),
    ]
    page = report.page("Scoring", sections, subtitle=config.input)
    storage.write_bytes(storage.join(config.output, REPORT), page.encode())
