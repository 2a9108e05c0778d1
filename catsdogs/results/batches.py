"""Rows of a result as compact arrays: 45 bytes for each image, whatever the length of its path.

Shapes: N rows, K classes, D features of the embedding.

A path is compared by the first 128 bits of its BLAKE2b hash. With 10 million paths, the probability that any two have
the same hash is n^2 / 2^129, about 1.5e-25.
"""

import hashlib
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.labels import normalize_name
from catsdogs.schema import OK, STATUSES

HASH_BYTES = 16
MAX_PROB = 1.001  # rounding may exceed 1
NONE = -1  # stands for null in `label` and `true`
# `prob` is NaN and `label` NONE unless the status is ok; `label` and `true` are indices of classes.
ROW = np.dtype(
    [
        ("hash", f"S{HASH_BYTES}"),  # numpy compares all bytes, also zeros
        ("status", np.int8),
        ("label", np.int32),
        ("true", np.int32),
        ("prob", np.float32),
        ("width", np.int32),
        ("height", np.int32),
        ("size_bytes", np.int64),
    ]
)
STATUS_CODES = {status: i for i, status in enumerate(STATUSES)}
OK_CODE = STATUS_CODES[OK]

Rows = npt.NDArray[Any]  # of dtype ROW


@dataclass(frozen=True)
class Batch:
    """Some rows of a result.

    Attributes:
        paths: (N,), strings.
        rows: ROW (N,).
        probs_NK: float32, in the order of the classes; the values of rows that are not `ok` are NaN.
        formats: images by extension.
        embeddings_ND: float32, of the rows that are `ok`; None without the column.
    """

    paths: pa.Array
    rows: Rows
    probs_NK: npt.NDArray[np.float32]
    formats: Counter[str]
    embeddings_ND: npt.NDArray[np.float32] | None


def hash_paths(paths: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """Hash paths; return S16 (N,)."""
    digests = [hashlib.blake2b(path.encode(), digest_size=HASH_BYTES).digest() for path in paths]
    return np.frombuffer(b"".join(digests), f"S{HASH_BYTES}")


def build_batch(uri: str, table: pa.RecordBatch, file_classes: Sequence[str], classes: Mapping[str, int]) -> Batch:
    """Check rows of a file and convert them.

    Args:
        uri: of the file, for messages.
        file_classes: the order of `probs`.
        classes: with the indices that they are to have, of A in a comparison.

    Raises:
        InputError: the rows are not those of predictions.
    """
    if table["path"].null_count:
        raise InputError(f"{uri}: expected a path in every row, found null")
    paths = table["path"].to_pylist()
    rows = np.zeros(len(paths), ROW)
    rows["hash"] = hash_paths(paths)
    rows["status"] = _encode(uri, table, "status", STATUS_CODES)
    rows["label"] = _encode(uri, table, "label", classes)
    rows["true"] = _encode(uri, table, "true_label", classes)
    rows["prob"] = table["prob"].fill_null(np.nan).to_numpy(zero_copy_only=False)
    for name in ("width", "height", "size_bytes"):
        rows[name] = table[name].fill_null(0).to_numpy(zero_copy_only=False)
    ok_N = rows["status"] == OK_CODE
    if (rows["status"] == NONE).any() or ((rows["label"] != NONE) != ok_N).any():
        raise InputError(f"{uri}: expected a status in every row, and a label where it is ok: written by another tool?")
    order_K = np.array([classes[normalize_name(name)] for name in file_classes])
    probs_NK = np.full((len(paths), len(order_K)), np.nan, np.float32)
    probs_NK[np.ix_(ok_N, order_K)] = _read_vectors(uri, table, "probs", ok_N, len(order_K))
    for values in (probs_NK[ok_N], rows["prob"][ok_N]):
        _check_probs(uri, values)
    embeddings_ND = _read_vectors(uri, table, "embedding", ok_N) if "embedding" in table.schema.names else None
    return Batch(table["path"], rows, probs_NK, Counter(map(_find_format, paths)), embeddings_ND)


def _check_probs(uri: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{uri}: expected probabilities where the status is ok, found NaN or null")
    if (outside := values[(values < 0) | (values > MAX_PROB)]).size:
        raise InputError(f"{uri}: expected probabilities of 0 to 1, found {outside[0]:g}: written by another tool?")


def _encode(uri: str, table: pa.RecordBatch, name: str, codes: Mapping[str, int]) -> npt.NDArray[np.int32]:
    """Convert the names in a column to their codes, null to NONE."""
    column = table[name].dictionary_encode()
    found = [normalize_name(value) for value in column.dictionary.to_pylist()]
    if unknown := [value for value in found if value not in codes]:
        raise InputError(f"{uri}: expected in the column {name} one of {', '.join(codes):.200}, found {unknown[0]!r}")
    values = np.array([*(codes[value] for value in found), NONE], np.int32)
    index_N = column.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)
    codes_N: npt.NDArray[np.int32] = values[index_N]
    return codes_N


def _read_vectors(
    uri: str, table: pa.RecordBatch, name: str, ok_N: npt.NDArray[np.bool_], length: int | None = None
) -> npt.NDArray[np.float32]:
    """Read the lists of the rows that are ok, which must have equal lengths: (N, length)."""
    lists = table[name].filter(pa.array(ok_N))
    lengths = pc.list_value_length(lists).unique().to_pylist() if len(lists) else [length or 0]
    values = lists.flatten()
    if len(lengths) != 1 or lengths[0] != (length or lengths[0]) or values.null_count:
        expected = "numbers, as many in each row" if length is None else f"{length} numbers"
        raise InputError(f"{uri}: expected {expected} in the column {name} where the status is ok; is it damaged?")
    array: npt.NDArray[np.float32] = values.to_numpy().reshape(len(lists), lengths[0])
    return array


def _find_format(path: str) -> str:
    """Return the extension of an image; "other" for what follows the last dot of any other name."""
    extension = posixpath.splitext(path)[1].lower()
    return extension if extension in storage.EXTENSIONS else "other" if extension else "none"
