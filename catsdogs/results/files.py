"""Results: outputs of `score` and `evaluate`, or one Parquet file of their columns. Files are read one by one."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.checkpoint import read_config
from catsdogs.errors import InputError
from catsdogs.labels import normalize_name
from catsdogs.results.batches import Batch, build_batch
from catsdogs.schema import EMBEDDINGS, PREDICTIONS
from catsdogs.text import format_names, format_reason

PART = re.compile(r"part-\d{5,}\.parquet")
SUCCESS, RUN, SUMMARY = "_SUCCESS", "_run.json", "_summary.json"  # of an output of `score`
EVALUATION = "predictions.parquet"
VALIDATION, BEST = "val_predictions.parquet", "best"  # of a run of `train`; this file has no metadata
EXPECTED = (
    "expected an output of score (part-00000.parquet and _SUCCESS), of evaluate (predictions.parquet), or one such "
    "Parquet file"
)
COLUMNS = [name for name in PREDICTIONS.names if name not in ("index", "error")]
BATCH_ROWS, BATCH_VALUES = 8192, 1 << 23  # rows of a batch, and with many classes its probabilities
MODEL_KEY, CLASSES_KEY = b"catsdogs.model_sha256", b"catsdogs.class_names"
# What pyarrow raises for content that is damaged.
DAMAGES = (pa.ArrowException, OSError, KeyError, ValueError)


@dataclass(frozen=True)
class Result:
    """An output of `score` or `evaluate`, or one Parquet file of their columns.

    Attributes:
        files: URIs of its Parquet files.
        num_rows: as `_summary.json` says; None without it.
        class_names: in the order of `probs`.
        model_sha256: None if the files do not say it.
    """

    uri: str
    files: tuple[str, ...]
    num_rows: int | None
    class_names: tuple[str, ...]
    model_sha256: str | None
    has_embeddings: bool

    @classmethod
    def open(cls, uri: str) -> "Result":
        """Find the files of a result, and read the metadata of the first.

        Raises:
            InputError: it is none, is unfinished, or was written by another tool.
        """
        files, num_rows = _find_files(uri)
        schema = _open_parquet(files[0], storage.read_bytes(files[0])).schema_arrow
        class_names, model_sha256 = _read_metadata(files[0], schema)
        return cls(uri, files, num_rows, class_names, model_sha256, "embedding" in schema.names)

    def iter_batches(self, classes: Mapping[str, int], with_embeddings: bool) -> Iterator[Batch]:
        """Read the rows, file by file.

        Args:
            classes: the result's classes, with the indices that they are to have.

        Raises:
            InputError: a file is missing, damaged, or has not the columns and classes of the first.
        """
        columns = [*COLUMNS, "embedding"] if with_embeddings else COLUMNS
        batch_rows = max(1, min(BATCH_ROWS, BATCH_VALUES // len(classes)))
        num_rows = 0
        for uri in self.files:
            file = _open_parquet(uri, storage.read_bytes(uri))
            if _read_metadata(uri, file.schema_arrow) != (self.class_names, self.model_sha256):
                raise InputError(f"{uri}: expected the model and the classes of {self.files[0]}, found others")
            for table in _iter_tables(uri, file, columns, batch_rows):
                num_rows += table.num_rows
                yield build_batch(uri, table, self.class_names, classes)
        self._check_num_rows(num_rows)

    def iter_paths(self) -> Iterator[list[str]]:
        """Read the paths again, file by file."""
        for uri in self.files:
            for table in _iter_tables(uri, _open_parquet(uri, storage.read_bytes(uri)), ["path"], BATCH_ROWS):
                yield table["path"].to_pylist()

    def _check_num_rows(self, num_rows: int) -> None:
        if not num_rows:
            raise InputError(f"{self.uri}: expected rows of images, found none")
        if self.num_rows is not None and self.num_rows != num_rows:
            raise InputError(
                f"{self.uri}: expected {self.num_rows:,} rows as its {SUMMARY} says, found {num_rows:,}: "
                f"see catsdogs verify --output {self.uri}"
            )


def _find_files(uri: str) -> tuple[tuple[str, ...], int | None]:
    """Find the Parquet files of a result, and how many rows they should have."""
    if uri.lower().endswith(".parquet") and not storage.exists(storage.join(uri, RUN)):
        return (uri,), None
    names = storage.list_names(uri)
    parts = tuple(storage.join(uri, name) for name in names if PART.fullmatch(name))
    if (parts or RUN in names) and SUCCESS not in names:
        raise InputError(f"{uri}: expected a finished scoring, found no {SUCCESS}: run the same score command again")
    if parts:
        return parts, _read_num_rows(storage.join(uri, SUMMARY)) if SUMMARY in names else None
    if EVALUATION in names:
        return (storage.join(uri, EVALUATION),), None
    shown = [name for name in names if not storage.is_temporary(name)]
    raise InputError(f"{uri}: {EXPECTED}, found {format_names(shown) if shown else 'nothing'}")


def _read_num_rows(uri: str) -> int:
    try:
        return int(json.loads(storage.read_bytes(uri))["rows"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{uri}: expected the summary of a scoring with the key rows: {error!r}") from error


def _open_parquet(uri: str, content: bytes) -> pq.ParquetFile:
    """Open a file and check its columns."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema = file.schema_arrow
    except DAMAGES as error:
        raise _damaged(uri, error) from error
    for field in (*PREDICTIONS, *EMBEDDINGS):
        if field.name in schema.names:
            _check_type(uri, field, schema)
        elif field.name in COLUMNS:
            raise InputError(
                f"{uri}: expected the column {field.name} of score, found only {format_names(schema.names)}"
            )
    return file


def _check_type(uri: str, field: pa.Field, schema: pa.Schema) -> None:
    if len(schema.get_all_field_indices(field.name)) > 1:
        raise InputError(f"{uri}: expected one column {field.name}, found several")
    found, expected = schema.field(field.name).type, field.type
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_list(found) and pa.types.is_list(expected):  # the names of their items may differ
        found, expected = found.value_type, expected.value_type
    if found != expected:
        raise InputError(
            f"{uri}: expected {expected} in the column {field.name}, found {found}: written by another tool?"
        )


def _iter_tables(uri: str, file: pq.ParquetFile, columns: list[str], num_rows: int) -> Iterator[pa.RecordBatch]:
    tables = file.iter_batches(num_rows, columns=columns)
    while True:
        try:
            table = next(tables, None)
            if table is None:
                return
            table.validate(full=True)  # text that is not UTF-8
        except DAMAGES as error:
            raise _damaged(uri, error) from error
        yield table


def _damaged(uri: str, error: BaseException) -> InputError:
    return InputError(f"{uri}: expected a Parquet file of score or evaluate, but it is damaged: {format_reason(error)}")


def _read_metadata(uri: str, schema: pa.Schema) -> tuple[tuple[str, ...], str | None]:
    """Read the class names and the model of a file."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    if CLASSES_KEY not in metadata:
        folder, _, name = uri.rpartition("/")
        if name == VALIDATION:
            return read_config(storage.join(folder, BEST))[0], None
        raise InputError(f"{uri}: expected {CLASSES_KEY.decode()} in the metadata of the file, found none: {EXPECTED}")
    try:
        names = json.loads(metadata[CLASSES_KEY])
        valid = len({normalize_name(name) for name in names}) == len(names) > 0
    except (ValueError, TypeError, RecursionError):
        valid = False
    if not valid or not isinstance(names, list):
        raise InputError(f"{uri}: expected a list of different names in its metadata {CLASSES_KEY.decode()}")
    model = metadata.get(MODEL_KEY)
    return tuple(names), None if model is None else model.decode("utf-8", "replace")
