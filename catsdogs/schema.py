"""Columns and types of the Parquet output; the values of its `status` column."""

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

# A later attempt may succeed.
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

# With --save-embeddings: the features that the model's head takes.
EMBEDDINGS = pa.schema([pa.field("embedding", pa.list_(pa.float32()))])
# With --min-precision: the calibrated `prob`, and the class or `review`.
DECISIONS = pa.schema([pa.field("confidence", pa.float32()), pa.field("decision", pa.string())])

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


def build_schema(with_embeddings: bool, with_decisions: bool) -> pa.Schema:
    """Build the schema of an output."""
    return pa.schema([*PREDICTIONS, *(EMBEDDINGS if with_embeddings else ()), *(DECISIONS if with_decisions else ())])


def parquet_bytes(table: pa.Table) -> bytes:
    """Write a table as Parquet in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def read_table(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file; pyarrow.ArrowException if it is damaged or a column is missing."""
    try:
        return pq.ParquetFile(pa.BufferReader(content)).read(columns=columns)
    except (OSError, KeyError, UnicodeDecodeError) as error:  # the content is in memory: all say that it is damaged
        raise pa.ArrowInvalid(str(error)) from error


def read_names(content: bytes) -> list[str]:
    """Read the names of a Parquet file's columns."""
    names: list[str] = pq.read_schema(pa.BufferReader(content)).names
    return names
