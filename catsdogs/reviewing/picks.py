"""Pick rows of a result: the least certain, suspect labels, or a random sample.

Shapes: N rows, P picks that look different so far, D features of the embedding.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.config import ReviewConfig
from catsdogs.results import NONE, OK_CODE, Batch, Rows, hash_paths

# Cosine similarity of embeddings from which two images look alike. Measured with a head on the TinyImageNet weights, on
# the 1,000 validation photographs of cats and dogs: the nearest other photograph has up to 0.969, the same one in bf16
# at least 0.9999. 2026-11-27.
MIN_ALIKE = 0.98
NUM_SPARE = 5  # rows that are kept for each pick, since some may look alike
COLUMNS = ("path", "label", "prob", "margin", "true_label")
ORDER = [("key", "ascending"), ("path", "ascending")]

Floats = npt.NDArray[np.float64]


class Picker:
    """Keeps the rows that come first by the strategy's key, batch by batch.

    Of images that look alike, only the first one is picked. If too few rows of a pass look different, the next pass
    leaves out all that look like a pick: then the picks are the same as if all rows were compared.
    """

    def __init__(self, config: ReviewConfig, class_names: list[str], drops_alike: bool) -> None:
        self._config, self._class_names = config, class_names
        self._drops_alike = drops_alike
        self._num_kept = config.n * (NUM_SPARE if drops_alike else 1)
        self._rows: pa.Table | None = None
        self._picks: pa.Table | None = None
        self._num_left = 0  # rows of this pass that may be picked
        self.num_candidates = 0

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch that the strategy takes."""
        taken_N = self._select(batch.rows)
        if self._picks is None:
            self.num_candidates += int(taken_N.sum())
        else:
            taken_N &= self._find_different(batch)
        self._num_left += int(taken_N.sum())
        margin_N = compute_margins(batch.probs_NK)
        key_N = self._compute_keys(batch, margin_N)
        positions = np.flatnonzero(taken_N)
        first = positions[np.argsort(key_N[positions], kind="stable")[: self._num_kept]]
        table = self._build_rows(batch, key_N, margin_N, first)
        both = table if self._rows is None else pa.concat_tables([self._rows, table])
        self._rows = both.take(pc.sort_indices(both, ORDER)[: self._num_kept])

    def _select(self, rows: Rows) -> npt.NDArray[np.bool_]:
        taken_N: npt.NDArray[np.bool_] = rows["status"] == OK_CODE
        if self._config.class_name is not None:
            taken_N &= rows["label"] == self._class_names.index(self._config.class_name)
        if self._config.strategy == "suspect":
            taken_N &= (rows["true"] != NONE) & (rows["true"] != rows["label"])
        return taken_N

    def _find_different(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Find the rows of a batch that are neither a pick nor look like one."""
        assert self._picks is not None
        assert batch.embeddings_ND is not None
        different_N = ~np.isin(batch.rows["hash"], hash_paths(self._picks["path"].to_pylist()))
        picked_PD = normalize_rows(np.stack(self._picks["embedding"].to_numpy()))
        cosine_NP = normalize_rows(batch.embeddings_ND) @ picked_PD.T
        different_N[batch.rows["status"] == OK_CODE] &= cosine_NP.max(axis=1) < MIN_ALIKE
        return different_N

    def finish_pass(self) -> bool:
        """Pick among the rows of a pass; return whether another pass may find more."""
        assert self._rows is not None
        rows = self._rows if self._picks is None else pa.concat_tables([self._picks, self._rows])
        was_cut = self._num_left > self._num_kept
        self._rows, self._num_left = None, 0
        if self._drops_alike and rows.num_rows:
            embeddings_ND = np.stack(rows["embedding"].to_numpy())
            rows = rows.take(pa.array(find_different(embeddings_ND, self._config.n)))
        self._picks = rows.slice(0, self._config.n)
        return was_cut and self._picks.num_rows < self._config.n

    def _compute_keys(self, batch: Batch, margin_N: Floats) -> Floats:
        """Compute what the rows are sorted by, ascending."""
        if self._config.strategy == "uncertain":
            return margin_N
        if self._config.strategy == "suspect":
            return -batch.rows["prob"].astype(np.float64)
        # A hash of the path is as good as a random number, and the same for every run.
        hashes = np.ascontiguousarray(batch.rows["hash"]).view(">u8")[::2]
        return hashes.astype(np.float64)

    def _build_rows(self, batch: Batch, key_N: Floats, margin_N: Floats, positions: npt.NDArray[np.intp]) -> pa.Table:
        rows = batch.rows[positions]
        names = np.array([*self._class_names, None], object)  # NONE is the last
        columns: dict[str, Any] = {
            "key": key_N[positions],
            "path": batch.paths.take(pa.array(positions)),
            "label": pa.array(names[rows["label"]], pa.string()),
            "prob": rows["prob"],
            "margin": margin_N[positions],
            "true_label": pa.array(names[rows["true"]], pa.string()),
        }
        if self._drops_alike and batch.embeddings_ND is not None:
            ok_N = batch.rows["status"] == OK_CODE
            embeddings = batch.embeddings_ND[(np.cumsum(ok_N) - 1)[positions]]
            columns["embedding"] = pa.array(list(embeddings), pa.list_(pa.float32()))
        return pa.table(columns)

    def pick(self) -> pa.Table:
        """Return the picks in order, with COLUMNS."""
        assert self._picks is not None
        return self._picks.select(COLUMNS)


def compute_margins(probs_NK: npt.NDArray[np.float32]) -> Floats:
    """Compute the difference between the two largest probabilities of each row; NaN where they are."""
    if probs_NK.shape[1] < 2:
        return probs_NK[:, 0].astype(np.float64)
    largest_N2 = np.partition(probs_NK, -2, axis=1)[:, -2:].astype(np.float64)
    margins: Floats = largest_N2[:, 1] - largest_N2[:, 0]
    return margins


def find_different(embeddings_ND: npt.NDArray[np.float32], num_rows: int) -> list[int]:
    """Find the first rows that look different from all found before, at most `num_rows`."""
    units_ND = normalize_rows(embeddings_ND)
    found: list[int] = []
    found_PD = np.zeros((min(num_rows, len(units_ND)), units_ND.shape[1]), np.float32)
    for i, unit_D in enumerate(units_ND):
        if len(found) == num_rows:
            break
        if not found or float((found_PD[: len(found)] @ unit_D).max()) < MIN_ALIKE:
            found_PD[len(found)] = unit_D
            found.append(i)
    return found


def normalize_rows(embeddings_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale rows to length 1; zeros stay zeros."""
    units_ND: npt.NDArray[np.float32] = embeddings_ND / np.maximum(
        np.linalg.norm(embeddings_ND, axis=1, keepdims=True), np.float32(1e-12)
    )
    return units_ND
