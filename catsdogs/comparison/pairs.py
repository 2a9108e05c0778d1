"""Images that are in both results: flips, changes of status, differences of probabilities, and accuracy.

An image changed if its status or its label did; a flip is another label of an image that both classified. The
difference of an image that both classified is that of the probability of A's label, which B may not have predicted.
Accuracy and recall are those of the images whose `true_label` both have and agree on. As in `evaluate`, an image that
is not classified counts as incorrect.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catsdogs.errors import InputError
from catsdogs.results import NONE, OK_CODE, Batch, Rows
from catsdogs.schema import STATUSES

MIN_SHARE = 0.01  # of the smaller result: with fewer images in both, figures of pairs are not computed
NUM_BINS = 20
NUM_SHOWN = 20  # of the largest changes
ROW_GROUP = 100_000  # rows of `changes.parquet`
CHANGES = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("status_a", pa.string(), nullable=False),
        pa.field("status_b", pa.string(), nullable=False),
        pa.field("label_a", pa.string()),
        pa.field("label_b", pa.string()),
        pa.field("prob_a", pa.float32()),
        pa.field("prob_b", pa.float32()),
        pa.field("difference", pa.float64()),  # of the probability of label_a; null unless both are `ok`
        pa.field("true_label", pa.string()),  # null if only one has it, or they differ
    ]
)

Counts = npt.NDArray[np.int64]


class SortedRows:
    """A's rows in the order of their hashes, to find those of given paths."""

    def __init__(self, rows: Rows, uri: str) -> None:
        hashes = np.ascontiguousarray(rows["hash"])
        order = np.argsort(hashes)
        self.rows, self._hashes = rows[order], hashes[order]
        self.is_found = np.zeros(len(rows), bool)
        check_distinct(self._hashes, uri)

    def find(self, hashes: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
        """Return which of the hashes A has, and the positions of these in `rows`."""
        positions = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found_N = self._hashes[positions] == hashes
        self.is_found[positions[found_N]] = True
        return found_N, positions[found_N]


def check_distinct(sorted_hashes: npt.NDArray[np.bytes_], uri: str) -> None:
    """Raise InputError if a path is in a result twice."""
    num_repeated = int((sorted_hashes[1:] == sorted_hashes[:-1]).sum())
    if num_repeated:
        raise InputError(f"{uri}: expected each path once, found {num_repeated:,} rows of paths that it has already")


@dataclass
class LabelledPairs:
    """Images of both results with their true label. `correct_KC` counts correct ones of each class, A's and B's."""

    support_K: Counts
    correct_KC: Counts
    num_only_a: int = 0  # correct in A, incorrect in B
    num_only_b: int = 0

    def add(self, a: Rows, b: Rows) -> None:
        """Count rows of the same images."""
        known_N = (a["true"] == b["true"]) & (a["true"] != NONE)
        true_N = a["true"][known_N]
        correct_N2 = np.column_stack([side["label"][known_N] == true_N for side in (a, b)])
        self.support_K += np.bincount(true_N, minlength=len(self.support_K))
        np.add.at(self.correct_KC, true_N, correct_N2)
        self.num_only_a += int((correct_N2[:, 0] & ~correct_N2[:, 1]).sum())
        self.num_only_b += int((correct_N2[:, 1] & ~correct_N2[:, 0]).sum())

    def compute_figures(self) -> dict[str, float | None]:
        """Compute the figures about labels; empty without labelled images."""
        total = int(self.support_K.sum())
        if not total:
            return {}
        accuracy_a, accuracy_b = (float(n / total) for n in self.correct_KC.sum(axis=0))
        known = self.support_K > 0
        recall_KC = self.correct_KC[known] / self.support_K[known, None]
        return {
            "accuracy_a": accuracy_a,
            "accuracy_b": accuracy_b,
            "accuracy_drop": accuracy_a - accuracy_b,
            "max_recall_drop": float((recall_KC[:, 0] - recall_KC[:, 1]).max()),
            "mcnemar_p": compute_mcnemar_p(self.num_only_a, self.num_only_b),
        }


def compute_mcnemar_p(num_only_a: int, num_only_b: int) -> float:
    """Compute the p-value of McNemar's exact test, two-sided (McNemar, Psychometrika 12, 1947).

    Args:
        num_only_a, num_only_b: images that only A, and only B, classifies correctly.
    """
    from scipy.stats import binomtest  # not at the top: takes half a second

    total = num_only_a + num_only_b
    return float(binomtest(num_only_a, total, 0.5).pvalue) if total else 1.0


class Pairs:
    """The images that are in both results, counted batch by batch of B; changed ones are written to `changes`."""

    def __init__(self, rows_a: SortedRows, class_names: list[str]) -> None:
        K = len(class_names)
        self._a, self._class_names = rows_a, class_names
        self.num_pairs = 0
        self.num_changed = 0
        self.labels: Counter[tuple[int, int]] = Counter()  # of A and B, of images that both classified
        self.statuses: Counter[tuple[str, str]] = Counter()
        self.labelled = LabelledPairs(np.zeros(K, np.int64), np.zeros((K, 2), np.int64))
        self.histogram = np.zeros(NUM_BINS, np.int64)  # of the differences, from 0 to 1
        self.largest = CHANGES.empty_table()
        self._differences: list[float] = []  # the sum of each batch
        self._max_difference = 0.0
        self._unwritten = CHANGES.empty_table()
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, CHANGES)

    def add(self, batch: Batch) -> None:
        """Compare rows of B with A's of the same paths."""
        found_N, positions = self._a.find(np.ascontiguousarray(batch.rows["hash"]))
        if not found_N.any():
            return
        a, b = self._a.rows[positions], batch.rows[found_N]
        self.num_pairs += len(a)
        both_ok = (a["status"] == OK_CODE) & (b["status"] == OK_CODE)
        difference_N = np.full(len(a), np.nan)
        rows = np.flatnonzero(found_N)[both_ok]
        prob_b = batch.probs_NK[rows, a["label"][both_ok]].astype(np.float64)
        difference_N[both_ok] = np.abs(a["prob"][both_ok].astype(np.float64) - prob_b)
        self._count(a[both_ok], b[both_ok], difference_N[both_ok])
        self.labelled.add(a, b)
        codes, counts = np.unique(np.column_stack([a["status"], b["status"]]), axis=0, return_counts=True)
        self.statuses.update({(STATUSES[i], STATUSES[j]): int(n) for (i, j), n in zip(codes, counts, strict=True)})
        changed = (a["status"] != b["status"]) | (a["label"] != b["label"])
        paths = batch.paths.take(pa.array(np.flatnonzero(found_N)[changed]))
        self._add_changes(self._build_changes(paths, a[changed], b[changed], difference_N[changed]))

    def _count(self, a: Rows, b: Rows, difference_N: npt.NDArray[np.float64]) -> None:
        """Count images that both classified."""
        labels, counts = np.unique(np.column_stack([a["label"], b["label"]]), axis=0, return_counts=True)
        self.labels.update({(int(i), int(j)): int(n) for (i, j), n in zip(labels, counts, strict=True)})
        self.histogram += np.histogram(difference_N, NUM_BINS, (0, 1))[0]
        self._differences.append(math.fsum(difference_N))
        self._max_difference = max(self._max_difference, float(difference_N.max(initial=0.0)))

    def _build_changes(self, paths: pa.Array, a: Rows, b: Rows, difference_N: npt.NDArray[np.float64]) -> pa.Table:
        names = np.array([*self._class_names, None], object)  # NONE is the last
        statuses = np.array(STATUSES, object)
        known = np.where(a["true"] == b["true"], a["true"], NONE)
        columns = {
            "path": paths,
            "status_a": statuses[a["status"]],
            "status_b": statuses[b["status"]],
            "label_a": names[a["label"]],
            "label_b": names[b["label"]],
            "prob_a": pa.array(a["prob"], from_pandas=True),  # NaN becomes null
            "prob_b": pa.array(b["prob"], from_pandas=True),
            "difference": pa.array(difference_N, from_pandas=True),
            "true_label": names[known],
        }
        return pa.table(columns, schema=CHANGES)

    def _add_changes(self, changes: pa.Table) -> None:
        if changes.num_rows:
            self.num_changed += changes.num_rows
            self._unwritten = pa.concat_tables([self._unwritten, changes])
            if self._unwritten.num_rows >= ROW_GROUP:
                self._write()
            both = pa.concat_tables([self.largest, changes])
            order = pc.sort_indices(both, [("difference", "descending", "at_end"), ("path", "ascending", "at_end")])
            self.largest = both.take(order[:NUM_SHOWN])

    def _write(self) -> None:
        self._writer.write_table(self._unwritten)
        self._unwritten = CHANGES.empty_table()

    def close(self) -> bytes:
        """Return the content of `changes.parquet`, in the order of B's rows."""
        self._write()
        self._writer.close()
        return bytes(self._sink.getvalue())

    @property
    def num_flipped(self) -> int:
        """Number of images whose label changed, of those that both classified."""
        return sum(n for (a, b), n in self.labels.items() if a != b)

    def compute_figures(self) -> dict[str, float | None]:
        """Compute the figures of pairs and of labels; a share of no image is missing."""
        figures: dict[str, float | None] = {"changed": self.num_changed / self.num_pairs}
        num_status = sum(n for (a, b), n in self.statuses.items() if a != b)
        figures["status_changed"] = num_status / self.num_pairs
        if num_both := sum(self.labels.values()):
            figures["flipped"] = self.num_flipped / num_both
            figures["mean_difference"] = math.fsum(self._differences) / num_both
            figures["max_difference"] = self._max_difference
        return figures | self.labelled.compute_figures()

    def summarize(self) -> dict[str, Any]:
        """Build the entries of `compare.json` about pairs."""
        names = self._class_names
        labelled = self.labelled
        recalls = zip(names, labelled.support_K.tolist(), labelled.correct_KC.tolist(), strict=True)
        return {
            "changes": self.num_changed,
            "flip_matrix": _nest({(names[a], names[b]): n for (a, b), n in sorted(self.labels.items())}),
            "status_matrix": _nest(dict(sorted(self.statuses.items()))),
            "labelled": int(labelled.support_K.sum()),
            "only_a_correct": labelled.num_only_a,
            "only_b_correct": labelled.num_only_b,
            "recall": {name: {"a": a / n, "b": b / n, "images": n} for name, n, (a, b) in recalls if n},
        }


def _nest(counts: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Convert counts of pairs to one entry for A's name, with one for B's name each."""
    nested: dict[str, dict[str, int]] = {}
    for (a, b), count in counts.items():
        nested.setdefault(a, {})[b] = count
    return nested
