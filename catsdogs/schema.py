"""Columns and types of the Parquet output; the words of its `status` column."""

import pyarrow as pa
import pyarrow.parquet as pq

OK = "ok"
STATUSES = (
    OK,
    "empty",
    "unsupported",
    "truncated",
    "decode_error",
    "too_large",
    "changed",
    "not_found",
    "access_denied",
    "read_error",
    "decoder_crash",
)

# Those of files that may do better another time.
RETRYABLE_STATUSES = ("changed", "not_found", "access_denied", "read_error", "decoder_crash")

PREDICTIONS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("prob", pa.float32()),
        pa.field("probs", pa.list_(pa.float32())),
        pa.field("error", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("size_bytes", pa.int64()),
        pa.field("true_label", pa.string()),
    ]
)

# Where asked for: what the model's head sees.
WITH_EMBEDDINGS = PREDICTIONS.append(pa.field("embedding", pa.list_(pa.float32())))

# One listed file. `version` is S3's etag, or a local file's modification time in ns.
FILES = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("version", pa.string()),
    ]
)

# One listed file with the index of its class.
LABELLED_FILES = FILES.append(pa.field("true_index", pa.int32(), nullable=False))


def parquet_bytes(table: pa.Table) -> bytes:
    """Lay a table out as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def read_table(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file's table, or some columns of it.

    Raises:
        pyarrow.ArrowException: it is no whole Parquet file, or lacks a column.
    """
    return pq.ParquetFile(pa.BufferReader(content)).read(columns=columns)
