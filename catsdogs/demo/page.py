"""What every step of the demo left -> one page."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import yaml
from PIL import Image

from catsdogs import report
from catsdogs.schema import OK

PICTURES_A_CLASS = 12


def write_page(folder: Path) -> str:
    """Write `report.html` from the files in the demo's folder."""
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    summary = json.loads((folder / "scores" / "_summary.json").read_text())
    rows = ds.dataset(sorted((folder / "scores").glob("part-*.parquet"))).to_table().to_pylist()
    with (folder / "run" / "summary.csv").open() as file:
        history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    sections = [
        report.facts(
            {
                "accuracy": f"{metrics['accuracy']:.4f}",
                "drawings evaluated": f"{metrics['n']:,}",
                "files scored": f"{summary['rows']:,}",
                "training img/s": f"{history[-1]['images_per_s']:.0f}",
            }
        ),
        report.curves(history),
        report.confusion_matrix(metrics["class_names"], metrics["confusion_matrix"], metrics["failed_by_class"]),
        report.dataset_grid(list(_pictures(folder / "data" / "train"))),
        report.label_counts(summary["by_label"]),
        report.failures(
            summary["by_status"], [(r["path"], r["status"], r["error"]) for r in rows if r["status"] != OK]
        ),
        report.settings(yaml.safe_load((folder / "run" / "args.yaml").read_text())),
    ]
    page = report.page("Demo", sections, subtitle=str(folder))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return f"{len(sections)} sections"


def _pictures(root: Path) -> Iterator[report.Picture]:
    for label in sorted(root.iterdir()):
        for path in sorted(label.iterdir())[:PICTURES_A_CLASS]:
            with Image.open(path) as image:
                yield report.Picture(path=str(path), image=np.asarray(image.convert("RGB")), true_label=label.name)
