"""compare(): what changed between two results, stage by stage. Calls, with the file of each:

    compare
    ├── Result.open          ../results/   the files of A and B; their classes must be the same
    ├── read_rows            A's rows, 45 bytes each
    ├── Pairs.add            pairs.py      B's rows, batch by batch, beside A's of the same paths
    ├── compute_drift        drift.py      the two sets of images
    └── _write               page.py       changes.parquet, report.html; compare.json is the last

Needs the memory of the compact rows, of one file and of the content of `changes.parquet`.
"""

import dataclasses
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from catsdogs import storage
from catsdogs.comparison.drift import Embeddings, ImageSet
from catsdogs.comparison.pairs import MIN_SHARE, Pairs, SortedRows, check_distinct
from catsdogs.config import DRIFT_FIGURES, FIGURES, LABEL_FIGURES, PAIR_FIGURES, CompareConfig
from catsdogs.errors import InputError
from catsdogs.labels import check_same_classes, normalize_name
from catsdogs.progress import Message, Progress, StageProgress
from catsdogs.results import Batch, Result, Rows, hash_paths
from catsdogs.schema import STATUSES

COMPARISON, CHANGES, REPORT = "compare.json", "changes.parquet", "report.html"
SAME_NAMES = (
    "no path is in both, but all file names of {} are in {}: if they are the same photographs, score both from the "
    "same folder or prefix"
)


def compare(config: CompareConfig, progress: Progress) -> dict[str, Any]:
    """Compare two results; return the content of `compare.json`."""
    uris = {name: storage.absolute(getattr(config, name)) for name in ("a", "b", "output")}
    config = dataclasses.replace(config, **uris)
    if config.output in (config.a, config.b):
        raise InputError(f"--output {config.output}: expected another folder than A and B")
    storage.list_names(config.output)  # fails now, not after the work, if the path is a file
    a, b = Result.open(config.a), Result.open(config.b)
    check_same_classes(a.class_names, b.class_names, a.uri, b.uri)
    comparison = _Comparison(a, b, progress)
    record = comparison.build_record()
    conditions = _check_conditions(config, record["figures"])
    record["conditions"] = conditions
    _write(config.output, record, comparison.pairs)
    return record


def _write(output: str, record: dict[str, Any], pairs: Pairs) -> None:
    """Write the files; `compare.json` is the last, so that it never stands beside those of another comparison."""
    from catsdogs.comparison.page import build_page  # not at the top: matplotlib would add a second to every start

    page = build_page(record, pairs.largest, pairs.histogram.tolist())
    contents = {CHANGES: pairs.close(), REPORT: page.encode(), COMPARISON: json.dumps(record, indent=2).encode()}
    storage.write_files(output, contents)


def _check_conditions(config: CompareConfig, figures: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Evaluate the conditions of `--fail-if`."""
    results = []
    for condition in config.conditions:
        value = figures[condition.figure]
        if value is None:
            raise InputError(
                f"--fail-if {condition}: {condition.figure} cannot be computed: {_explain(condition.figure)}"
            )
        results.append({"condition": str(condition), "value": value, "holds": condition.holds(value)})
    return results


def _explain(figure: str) -> str:
    """Say what a figure needs."""
    if figure in LABEL_FIGURES:
        return "no image is in both with the same true_label"
    if figure == "embedding_shift":
        return "A and B need the column embedding, from the same model (score --save-embeddings)"
    if figure in DRIFT_FIGURES:
        return "no image of A, or none of B, has the status ok"
    assert figure in PAIR_FIGURES
    return f"it needs classified images in both, and {MIN_SHARE:.0%} of the paths of the smaller one in both"


class _Comparison:
    """Both results, read."""

    def __init__(self, a: Result, b: Result, progress: Progress) -> None:
        self._a, self._b, self._progress = a, b, progress
        self._class_names = [normalize_name(name) for name in a.class_names]
        with_embeddings = a.has_embeddings and b.has_embeddings and a.model_sha256 == b.model_sha256
        self._with_embeddings = with_embeddings and a.model_sha256 is not None
        rows, self._set_a = self._read(a, lambda batch: None)
        self._rows_a = SortedRows(rows, a.uri)
        self._by_status_a = _count_statuses(rows)
        del rows  # 45 bytes an image, for as long as B is read
        self.pairs = Pairs(self._rows_a, self._class_names)
        rows, self._set_b = self._read(b, self.pairs.add)
        check_distinct(np.sort(np.ascontiguousarray(rows["hash"])), b.uri)
        self._by_status_b = _count_statuses(rows)

    def _read(self, result: Result, add: Callable[[Batch], None]) -> tuple[Rows, ImageSet]:
        """Read all rows of a result; call `add` with each batch."""
        classes = {name: i for i, name in enumerate(self._class_names)}
        tables: list[Rows] = []
        formats: Counter[str] = Counter()
        embeddings = Embeddings()
        num_rows = 0
        for batch in result.iter_batches(classes, self._with_embeddings):
            tables.append(batch.rows)
            formats += batch.formats
            if batch.embeddings_ND is not None:
                embeddings.add(batch.embeddings_ND)
            add(batch)
            num_rows += len(batch.rows)
            self._progress(StageProgress("read", num_rows, result.num_rows, result.uri))
        rows = np.concatenate(tables)
        return rows, ImageSet(rows, self._class_names, formats, embeddings)

    def build_record(self) -> dict[str, Any]:
        """Build the content of `compare.json` without the conditions."""
        num_a, num_b, num_both = len(self._rows_a.rows), sum(self._by_status_b.values()), self.pairs.num_pairs
        figures: dict[str, float | None] = dict.fromkeys(FIGURES)
        figures |= {"in_both": num_both, "only_in_a": num_a - num_both, "only_in_b": num_b - num_both}
        figures |= self._set_a.compute_drift(self._set_b)
        has_pairs = num_both >= MIN_SHARE * min(num_a, num_b) and num_both > 0
        if has_pairs:
            figures |= self.pairs.compute_figures()
        if not has_pairs and figures["psi"] is None:
            raise InputError(
                f"nothing can be compared: {num_both:,} paths are in both, and {self._a.uri} or {self._b.uri} has "
                "no image with the status ok"
            )
        return {
            "a": self._summarize(self._a, self._by_status_a, self._set_a),
            "b": self._summarize(self._b, self._by_status_b, self._set_b),
            "class_names": self._class_names,
            "figures": figures,
            "pairs": self.pairs.summarize() if has_pairs else None,
            "note": self._find_note(num_both, has_pairs),
        }

    def _summarize(self, result: Result, by_status: dict[str, int], images: ImageSet) -> dict[str, Any]:
        rows = {"rows": sum(by_status.values()), "by_status": by_status, "model_sha256": result.model_sha256}
        return {"uri": result.uri, **rows, **images.summarize()}

    def _find_note(self, num_both: int, has_pairs: bool) -> str | None:
        """Find what the user should know about the paths."""
        note = None
        if num_both == 0:
            names = [_hash_file_names(result) for result in (self._a, self._b)]
            if np.isin(*names).all():
                note = SAME_NAMES.format("A", "B")
            elif np.isin(names[1], names[0]).all():
                note = SAME_NAMES.format("B", "A")
        elif not has_pairs:
            note = f"only {num_both:,} paths are in both, too few for figures: their changes are in {CHANGES}"
        if note is not None:
            self._progress(Message(note))
        return note


def _count_statuses(rows: Rows) -> dict[str, int]:
    counts = np.bincount(rows["status"], minlength=len(STATUSES)).tolist()
    return {status: n for status, n in zip(STATUSES, counts, strict=True) if n}


def _hash_file_names(result: Result) -> Any:
    """Hash the last part of each path; distinct, S16."""
    hashes = [np.unique(hash_paths([posixpath.basename(path) for path in paths])) for paths in result.iter_paths()]
    return np.unique(np.concatenate(hashes))
