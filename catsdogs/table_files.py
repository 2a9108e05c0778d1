"""Read columns of Parquet, CSV and JSON Lines files row by row, and write CSV. What a file unpacks to is limited."""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET = (".parquet",)
CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
JSON_LINES = (".jsonl", ".jsonl.gz")
DELIMITERS = ",;\t|"
GZIP_MAGIC = b"\x1f\x8b"
MAX_UNPACKED_BYTES = 1 << 30  # of the text of a file, or of its columns; about 10 million paths
MAX_ROWS = 100_000_000  # of one file; a repeated value takes next to no space in Parquet
MAX_RECORD_CHARS = 1 << 24  # of one line of text, or one row of CSV, which may have line breaks in quotes
PIECE_BYTES = 1 << 24  # of text, to find its encoding
BATCH_ROWS = 1 << 20  # of Parquet; a row takes four bytes until its value is needed

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, and UTF-8 cannot

# What reading a file raises if it is damaged, too long, or has not the columns.
READ_ERRORS = (EOFError, OSError, ValueError, csv.Error, pa.ArrowException, zlib.error)


@dataclass(frozen=True)
class Column:
    """A column to read.

    Attributes:
        names: that it may have; if a file has several of them, the first one is read.
        hint: is added to the message if there is none.
        optional: without the column, its values are None.
    """

    names: tuple[str, ...]
    hint: str = ""
    optional: bool = False

    def find(self, found: Sequence[str]) -> int | None:
        """Find the column among the names of a file; ValueError if it is missing or there are several."""
        name = next((name for name in self.names if name in found), None)
        if name is not None and found.count(name) == 1:
            return found.index(name)
        if name is None and self.optional:
            return None
        expected = " or ".join(filter(None, (", ".join(self.names[:-1]), self.names[-1])))
        reason = f"there is none, only {', '.join(found) or 'other columns'}" if name is None else "there are several"
        raise ValueError(f"expected a column named {expected}{self.hint}: {reason}")


# The number of each line or row, and the values of its columns.
NumberedRows = Iterator[tuple[int, tuple[object, ...]]]


def iter_rows(uri: str, content: bytes, columns: Sequence[Column]) -> NumberedRows:
    """Iterate over the rows of a file whose name has one of the extensions.

    Values of Parquet and JSON Lines have the types that they have there, those of CSV are str. A value is None where
    its column or field is missing.

    Raises:
        One of READ_ERRORS, while iterating.
    """
    name = uri.lower()
    if name.endswith(PARQUET):
        return _iter_parquet(content, columns)
    lines = open_text(content)
    return _iter_csv(lines, columns) if name.endswith(CSV) else _iter_json_lines(lines, columns)


def _iter_parquet(content: bytes, columns: Sequence[Column]) -> NumberedRows:
    """Read a value only when its row is needed: one value of a dictionary may stand in any number of rows."""
    schema = pq.read_schema(pa.BufferReader(content))
    names = [None if (i := column.find(schema.names)) is None else schema.names[i] for column in columns]
    for name in filter(None, names):
        if pa.types.is_nested(kind := schema.field(name).type):
            raise ValueError(f"expected text in the column {name}, got {kind}")
    selected = list(filter(None, names))
    file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=selected)
    _check_length(sum(_count_unpacked_bytes(file.metadata, selected)))
    num_bytes = 0
    batches = file.iter_batches(BATCH_ROWS, columns=selected)
    for number, row in enumerate(itertools.chain.from_iterable(_iter_batch(batch, names) for batch in batches), 1):
        num_bytes += sum(len(value) for value in row if isinstance(value, str | bytes))
        _check_length(num_bytes, number)
        yield number, tuple(value.decode() if isinstance(value, bytes) else value for value in row)


def _count_unpacked_bytes(metadata: pq.FileMetaData, names: Sequence[str]) -> Iterator[int]:
    """Yield what the columns of each row group unpack to, as the file says."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        yield from (column.total_uncompressed_size for column in columns if column.path_in_schema in names)


def _iter_batch(batch: pa.RecordBatch, names: Sequence[str | None]) -> Iterator[tuple[object, ...]]:
    missing = [None] * batch.num_rows
    return zip(*(missing if name is None else _iter_values(batch[name]) for name in names), strict=True)


def _iter_values(column: pa.Array) -> Iterator[object]:
    if not pa.types.is_dictionary(column.type):
        yield from column.to_pylist()
        return
    values = column.dictionary.to_pylist()
    yield from (None if index is None else values[index] for index in column.indices.to_pylist())


def _check_length(num_bytes: int, num_rows: int = 0) -> None:
    if num_bytes > MAX_UNPACKED_BYTES or num_rows > MAX_ROWS:
        limits = f"{MAX_UNPACKED_BYTES >> 20:,} MiB and {MAX_ROWS:,} rows"
        raise ValueError(f"expected at most {limits}, unpacked; split it into several files")


def open_text(content: bytes) -> io.TextIOWrapper:
    """Open the text of a file, which may be compressed by gzip; ValueError if it is too long or not UTF-8."""
    if content.startswith(GZIP_MAGIC):
        with gzip.open(io.BytesIO(content)) as file:
            content = file.read(MAX_UNPACKED_BYTES + 1)
    _check_length(len(content))
    return io.TextIOWrapper(io.BytesIO(content), _find_encoding(content), newline="\n")


def _find_encoding(content: bytes) -> str:
    """Return UTF-16 if the content begins with its byte order mark, else UTF-8; ValueError if it is neither."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    decoder, num_lines = codecs.getincrementaldecoder(encoding)(), 0
    for start in range(0, len(content), PIECE_BYTES):
        end = start + PIECE_BYTES
        try:
            text = decoder.decode(content[start:end], final=end >= len(content))
        except UnicodeDecodeError as error:
            byte, line = error.object[error.start], num_lines + error.object.count(b"\n", 0, error.start) + 1
            reason = f"expected UTF-8, found the byte 0x{byte:02x} in line {line}"
            raise ValueError(f"{reason}; convert it, for example: iconv -f LATIN1 -t UTF-8") from error
        if "\0" in text:
            raise ValueError("expected UTF-8, found zero bytes; save it as UTF-8")
        num_lines += text.count("\n")
    return encoding


def _iter_csv(lines: io.TextIOWrapper, columns: Sequence[Column]) -> NumberedRows:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_CHARS))  # of the process; the default is 128 KiB
    delimiter, header = _find_delimiter(lines, columns)
    if not header:
        return
    indices = [column.find(header) for column in columns]
    lines.seek(0)
    # Strict, else a stray quote would hide the rows after it.
    for number, row in itertools.islice(_iter_csv_rows(lines, delimiter, strict=True), 1, None):
        if any(row[len(header) :]):
            fields = f"{len(header)} field{'s' * (len(header) > 1)} as in the header, found {len(row)}"
            raise ValueError(f"expected {fields} in line {number}; quote what contains {delimiter!r}")
        yield number, tuple(row[i] if i is not None and i < len(row) else None for i in indices)


def _find_delimiter(lines: io.TextIOWrapper, columns: Sequence[Column]) -> tuple[str, list[str]]:
    """Return the first delimiter that separates a column of ours in the header, else the first, and its header."""
    names = {name for column in columns for name in column.names}
    headers = {}
    for delimiter in DELIMITERS:
        lines.seek(0)
        header = next(_iter_csv_rows(lines, delimiter), (0, []))[1]
        headers[delimiter] = [name.strip() for name in header]
    delimiter = next((delimiter for delimiter, header in headers.items() if names & set(header)), DELIMITERS[0])
    return delimiter, headers[delimiter]


def _iter_csv_rows(lines: io.TextIOWrapper, delimiter: str, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line and the fields of each row that is not empty."""
    text = LimitedLines(lines)
    reader = csv.reader(text, delimiter=delimiter, strict=strict)
    for row in reader:
        text.start_record()
        if row:
            yield reader.line_num, row


def _iter_json_lines(lines: io.TextIOWrapper, columns: Sequence[Column]) -> NumberedRows:
    text = LimitedLines(lines)
    for number, line in enumerate(text, 1):
        text.start_record()
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a JSON object in line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object in line {number}, got {line.strip()[:80]}")
        values = tuple(next((row[name] for name in column.names if name in row), None) for column in columns)
        if any(isinstance(value, str) and LONE_SURROGATE.search(value) for value in values):
            raise ValueError(f"expected text in line {number}, found half of a surrogate pair; is it damaged?")
        yield number, values


def format_csv(rows: Iterable[Sequence[object]]) -> str:
    """Format rows as CSV that `iter_rows` and others read back unchanged, whatever a file name contains.

    Python before 3.13 does not quote a carriage return by itself.
    """
    text = io.StringIO()
    writer, quoting = csv.writer(text, lineterminator="\n"), csv.writer(text, csv.unix_dialect)
    for row in rows:
        has_return = any(isinstance(value, str) and "\r" in value for value in row)
        (quoting if has_return else writer).writerow(row)
    return text.getvalue()


class LimitedLines:
    """Iterates over lines; ValueError if a record, which may have several lines, has MAX_RECORD_CHARS."""

    def __init__(self, lines: io.TextIOWrapper) -> None:
        self._lines, self._num_chars = lines, 0

    def start_record(self) -> None:
        """Count the characters of the next record from 0."""
        self._num_chars = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._lines.readline(MAX_RECORD_CHARS):
            self._num_chars += len(line)
            if self._num_chars >= MAX_RECORD_CHARS:
                raise ValueError(f"expected less than {MAX_RECORD_CHARS:,} characters in a line or row")
            yield line
