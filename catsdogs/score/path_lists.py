"""Read path lists: the column `path` of Parquet and CSV files, or the lines of text files.

A folder whose name ends like such a file is a list too: its files are read in order, as Spark, Dask and Ray Data write
them, also in subfolders. Names in it that begin with `_` or `.` are ignored, such as `_SUCCESS` and `_metadata`.

Who writes a list chooses what this machine reads. So its paths have the scheme of the list, or are local if it is
local, unless the user allows others; and what it unpacks to is limited.
"""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import zlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.errors import InputError, RunError

PARQUET = (".parquet",)
CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
TEXT = (".txt", ".txt.gz")
DELIMITERS = ",;\t|"
GZIP_MAGIC = b"\x1f\x8b"
COMMENT = "# "  # a file may have a name that begins with # alone
MAX_LIST_BYTES = 1 << 30  # of the unpacked paths or text of one file, about 10 million paths
MAX_LIST_ROWS = 100_000_000  # of one file; a repeated path takes next to no space in Parquet
MAX_RECORD_CHARS = 1 << 24  # of one line of text, or one row of CSV, which may have line breaks in quotes
PIECE_BYTES = 1 << 24  # of text, to find its encoding
BATCH_ROWS = 1 << 20  # of Parquet; a row takes four bytes until its path is needed

# The number of each line or row, and the path in it.
NumberedPaths = Iterator[tuple[int, object]]


def is_path_list(uri: str) -> bool:
    """Whether `--input` is a path list; its name decides."""
    return uri.lower().endswith(PARQUET + CSV + TEXT)


class PathList:
    """The paths in a path list, in its order. Each iteration reads its files again; one at a time is in memory.

    Args:
        allow_schemes: schemes that paths may have beside that of the list, separated by commas.

    Raises:
        InputError: there is no such list, or it cannot be read; while iterating: a file of it cannot be parsed, or a
            path has another scheme.
        RunError: while iterating: a file is not what an earlier iteration read.
    """

    def __init__(self, uri: str, allow_schemes: str | None = None) -> None:
        self._schemes = {storage.find_scheme(uri), *_parse_schemes(allow_schemes)}
        # A remote file is read, not listed: a listing may not be permitted.
        found = None if storage.is_local(uri) else storage.read_versioned(uri)
        self._last_read = ("", b"") if found is None else (uri, found[0])
        self._uris = _list_files(uri) if found is None else [uri]
        self._digests: dict[str, bytes] = {}
        if not self._uris:
            raise InputError(f"cannot read {uri}: expected a path list or a folder of path lists; check --input")

    def __iter__(self) -> Iterator[str]:
        for uri in self._uris:
            yield from _iter_paths(uri, self._read(uri), self._schemes)

    def _read(self, uri: str) -> bytes:
        if self._last_read[0] != uri:
            self._last_read = ("", b"")  # before the next file is in memory
            self._last_read = (uri, storage.read_bytes(uri))
        content = self._last_read[1]
        digest = hashlib.sha256(content).digest()
        if self._digests.setdefault(uri, digest) != digest:
            raise RunError(f"{uri} changed while this path list was read: run again when it is complete")
        return content


def _parse_schemes(allow_schemes: str | None) -> list[str]:
    schemes = [scheme.strip().lower() for scheme in (allow_schemes or "").split(",") if scheme.strip()]
    if unknown := [scheme for scheme in schemes if scheme not in storage.SCHEMES]:
        expected = f"expected some of {', '.join(storage.SCHEMES)}, separated by commas"
        raise InputError(f"--allow-schemes: {expected}, got {unknown[0]!r}")
    return schemes


def _list_files(uri: str) -> list[str]:
    """List the file, or the files of the folder."""
    extensions = next(kind for kind in (PARQUET, CSV, TEXT) if uri.lower().endswith(kind))
    listing = storage.Listing(uri, collect_folders=False, extensions=extensions)
    paths = [entry.path for entry in listing]
    if listing.unlisted:
        path, reason = next(iter(listing.unlisted.items()))
        raise InputError(f"{uri}: cannot list {path} in this path list: {reason}")
    return [path for path in paths if not any(name.startswith("_") for name in listing.relative(path).split("/"))]


def _iter_paths(uri: str, content: bytes, schemes: set[str]) -> Iterator[str]:
    is_parquet = uri.lower().endswith(PARQUET)
    unit, number = "row" if is_parquet else "line", 0
    try:
        for number, path in _iter_parquet(content) if is_parquet else _iter_text_file(uri, content):
            if not isinstance(path, str) or not path:
                reason = f"expected a path in every row of its column path, got {path!r} in {unit} {number}"
                raise InputError(f"{uri}: {reason}")
            yield _check_path(path, schemes, f"{uri}: {unit} {number}")
    except (EOFError, OSError, ValueError, csv.Error, pa.ArrowException, zlib.error) as error:
        place = f" after {unit} {number}" if number else ""
        raise InputError(f"{uri}: cannot read this path list{place}: {' '.join(str(error).split())}") from error


def _check_path(path: str, schemes: set[str], place: str) -> str:
    """Make a path absolute; InputError if it has another scheme or cannot be opened."""
    scheme = storage.find_scheme(path)
    if scheme not in schemes:
        allowed = " or ".join("a local path" if name == "file" else f"{name}://" for name in sorted(schemes))
        hint = f"; if the list may name such files, add --allow-schemes {scheme}" if scheme in storage.SCHEMES else ""
        raise InputError(f"{place}: expected {allowed}, got {path[:200]}{hint}")
    try:
        return storage.absolute(path)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _iter_parquet(content: bytes) -> NumberedPaths:
    """Read a path only when its row is needed: one path of a dictionary may stand in any number of rows."""
    schema = pq.read_schema(pa.BufferReader(content))
    kind = schema.types[_find_column(schema.names)]
    if pa.types.is_nested(kind):
        raise ValueError(f"expected text in the column path, got {kind}")
    file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=["path"])
    _check_length(sum(_count_unpacked_bytes(file.metadata)))
    rows = itertools.chain.from_iterable(map(_iter_rows, file.iter_batches(BATCH_ROWS, columns=["path"])))
    num_bytes = 0
    for number, path in enumerate(rows, 1):
        num_bytes += len(path) if isinstance(path, str | bytes) else 0
        _check_length(num_bytes, number)
        yield number, path.decode() if isinstance(path, bytes) else path


def _count_unpacked_bytes(metadata: pq.FileMetaData) -> Iterator[int]:
    """Yield what the paths of each row group unpack to, as the file says."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        yield from (column.total_uncompressed_size for column in columns if column.path_in_schema == "path")


def _iter_rows(batch: pa.RecordBatch) -> Iterator[object]:
    column = batch["path"]
    if not pa.types.is_dictionary(column.type):
        yield from column.to_pylist()
        return
    values = column.dictionary.to_pylist()
    yield from (None if index is None else values[index] for index in column.indices.to_pylist())


def _check_length(num_bytes: int, num_rows: int = 0) -> None:
    if num_bytes > MAX_LIST_BYTES or num_rows > MAX_LIST_ROWS:
        limits = f"{MAX_LIST_BYTES >> 20:,} MiB and {MAX_LIST_ROWS:,} rows"
        raise ValueError(f"expected at most {limits}, unpacked; split it into a folder of path lists")


def _find_column(names: list[str]) -> int:
    if names.count("path") != 1:
        found = "there are several" if "path" in names else f"there is none, only {', '.join(names) or 'other columns'}"
        raise ValueError(f"expected a column named path (in .txt, one path a line): {found}")
    return names.index("path")


def _iter_text_file(uri: str, content: bytes) -> NumberedPaths:
    if content.startswith(GZIP_MAGIC):
        with gzip.open(io.BytesIO(content)) as file:
            content = file.read(MAX_LIST_BYTES + 1)
    _check_length(len(content))
    lines = io.TextIOWrapper(io.BytesIO(content), _find_encoding(content), newline="\n")
    return _iter_csv(lines) if uri.lower().endswith(CSV) else _iter_lines(lines)


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


def _iter_csv(lines: io.TextIOWrapper) -> NumberedPaths:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_CHARS))  # of the process; the default is 128 KiB
    headers = {}
    for delimiter in DELIMITERS:
        lines.seek(0)
        headers[delimiter] = next(_iter_csv_rows(lines, delimiter), (0, []))[1]
    delimiter = next((delimiter for delimiter, names in headers.items() if "path" in names), DELIMITERS[0])
    if not headers[delimiter]:
        return
    column = _find_column(headers[delimiter])
    lines.seek(0)
    # Strict, else a stray quote would hide the rows after it.
    for number, row in itertools.islice(_iter_csv_rows(lines, delimiter, strict=True), 1, None):
        yield number, row[column] if column < len(row) else None


def _iter_csv_rows(lines: io.TextIOWrapper, delimiter: str, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line and the fields of each row that is not empty."""
    text = _LimitedLines(lines)
    reader = csv.reader(text, delimiter=delimiter, strict=strict)
    for row in reader:
        text.num_chars = 0
        if row:
            yield reader.line_num, row


def _iter_lines(lines: io.TextIOWrapper) -> NumberedPaths:
    text = _LimitedLines(lines)
    for number, line in enumerate(text, 1):
        text.num_chars = 0
        path = line.rstrip("\n").removesuffix("\r")
        if path.strip() and not path.startswith(COMMENT):
            yield number, path


class _LimitedLines:
    """Iterates over lines; ValueError if there are MAX_RECORD_CHARS since its user set `num_chars` to 0."""

    def __init__(self, lines: io.TextIOWrapper) -> None:
        self._lines, self.num_chars = lines, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._lines.readline(MAX_RECORD_CHARS):
            self.num_chars += len(line)
            if self.num_chars >= MAX_RECORD_CHARS:
                raise ValueError(f"expected less than {MAX_RECORD_CHARS:,} characters in a line or row")
            yield line
