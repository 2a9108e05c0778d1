"""Convert decoded rows and the model's probabilities to the columns of the output, without torch.

Shapes: N rows, K classes, D features.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.decisions import Decisions
from catsdogs.errors import RunError
from catsdogs.labels import normalize_name
from catsdogs.schema import OK, build_schema

FloatArray = npt.NDArray[np.float32]


def build_predictions(
    rows: pa.Table,
    probs_NK: FloatArray,
    class_names: Sequence[str],
    embeddings_ND: FloatArray | None = None,
    decisions: Decisions | None = None,
) -> pa.Table:
    """Build a table of schema PREDICTIONS, with embeddings and decisions if they are given.

    Args:
        rows: decoded rows: `path`, `size_bytes`, `status`, `error`, `width`, `height`, and `true_index` where the
            files are labelled.
        probs_NK: the values of rows that are not `ok` are ignored.

    Raises:
        RunError: a probability of an `ok` row is NaN.
    """
    index_N = probs_NK.argmax(axis=1)
    predicted = {
        "label": pa.array(np.array(class_names, dtype=object)[index_N], pa.string()),
        "index": pa.array(index_N.astype(np.int32)),
        "prob": pa.array(probs_NK.max(axis=1, initial=0.0)),
        "probs": pa.array(list(probs_NK), pa.list_(pa.float32())),
    }
    if embeddings_ND is not None:
        predicted["embedding"] = pa.array(list(embeddings_ND), pa.list_(pa.float32()))
    if decisions is not None:
        predicted |= decisions.build_columns(probs_NK, index_N)
    failed_N = np.asarray(pc.not_equal(rows["status"], OK))
    _check_finite(rows, probs_NK, ~failed_N)
    failed = pa.array(failed_N)
    predicted = {name: pc.if_else(failed, pa.scalar(None, column.type), column) for name, column in predicted.items()}
    columns = {name: rows[name] for name in ("path", "status", "error", "width", "height", "size_bytes")}
    columns |= predicted | {"true_label": find_true_labels(rows, class_names)}
    schema = build_schema(embeddings_ND is not None, decisions is not None)
    return pa.table({field.name: columns[field.name] for field in schema}).cast(schema)


def _check_finite(rows: pa.Table, probs_NK: FloatArray, ok_N: npt.NDArray[np.bool_]) -> None:
    damaged_N = np.flatnonzero(ok_N & ~np.isfinite(probs_NK).all(axis=1))
    if len(damaged_N):
        raise RunError(
            f"{rows['path'][damaged_N[0]]}: expected probabilities from 0 to 1, the model computed NaN: its training "
            "diverged or its weights are damaged; use the checkpoint of an earlier epoch, or train with a lower --lr"
        )


def find_true_labels(rows: pa.Table, class_names: Sequence[str]) -> pa.Array:
    """Find each row's true label: that of `true_index`, else the class with the parent folder's name, else null."""
    if "true_index" in rows.column_names:
        return pa.array([class_names[i] for i in rows["true_index"].to_numpy()], pa.string())
    known = {normalize_name(name): name for name in class_names}
    folders = [storage.parent_name(path) for path in rows["path"].to_pylist()]
    return pa.array([known.get(normalize_name(folder)) for folder in folders], pa.string())
