"""Examples of each class for `_report.html`: the images that the model is most and least sure of."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.images import ImageArray
from catsdogs.schema import OK, read_table
from catsdogs.score.plan import Plan

if TYPE_CHECKING:
    from catsdogs.report import Picture

NUM_EACH = 6
MAX_CLASSES = 25  # the most frequent ones: with thumbnails of 6 KB, the page stays below 3 MB
MAX_PARTS = 5  # that are read; of a large output, evenly spaced

DecodeImages = Callable[[Iterable[str]], Mapping[str, ImageArray]]  # paths -> images of those that can be decoded
Examples = dict[str, tuple[list["Picture"], list["Picture"]]]  # by label: sure and unsure ones


class ClassExamples(NamedTuple):
    """The rows of a class with the highest and the lowest probabilities, in that order: `path` and `prob`."""

    sure: pa.Table
    unsure: pa.Table


def build_examples(plan: Plan, by_label: Mapping[str, int], decode_images: DecodeImages) -> Examples:
    """Select and decode the examples of the most frequent classes."""
    from catsdogs.report import Picture  # not at the top: matplotlib would add a second to every start

    selected = _select_examples(plan, by_label)
    images = decode_images(path for rows in selected.values() for table in rows for path in table["path"].to_pylist())

    def build(label: str, rows: pa.Table) -> list[Picture]:
        pairs = zip(rows["path"].to_pylist(), rows["prob"].to_pylist(), strict=True)
        return [
            Picture(path=path, image=images[path], label=label, prob=prob) for path, prob in pairs if path in images
        ]

    return {label: (build(label, rows.sure), build(label, rows.unsure)) for label, rows in selected.items()}


def _select_examples(plan: Plan, by_label: Mapping[str, int]) -> dict[str, ClassExamples]:
    """Select rows of the most frequent classes; a row is sure or unsure, not both."""
    num_parts = min(MAX_PARTS, len(plan.sizes))
    shards = np.linspace(0, len(plan.sizes) - 1, num_parts).astype(int)
    labels = sorted(by_label, key=lambda label: -by_label[label])[:MAX_CLASSES]
    candidates: dict[str, list[pa.Table]] = {label: [] for label in labels}
    for shard in shards.tolist():
        rows = read_table(storage.read_bytes(plan.part_uri(shard)), ["path", "status", "label", "prob"])
        rows = rows.filter(pc.equal(rows["status"], OK))
        for label in labels:
            candidates[label].append(_select_ends(rows.filter(pc.equal(rows["label"], label))))
    return {label: _divide(pa.concat_tables(tables)) for label, tables in candidates.items()}


def _select_ends(rows: pa.Table) -> pa.Table:
    """Select the rows with the highest and the lowest probabilities, each once, the highest first."""
    rows = rows.select(["path", "prob"]).sort_by([("prob", "descending"), ("path", "ascending")])
    start = max(NUM_EACH, rows.num_rows - NUM_EACH)
    return pa.concat_tables([rows.slice(0, NUM_EACH), rows.slice(start)])


def _divide(rows: pa.Table) -> ClassExamples:
    ends = _select_ends(rows)
    num_sure = min(NUM_EACH, -(-ends.num_rows // 2))
    unsure = ends.slice(num_sure).sort_by([("prob", "ascending"), ("path", "ascending")])
    return ClassExamples(ends.slice(0, num_sure), unsure)
