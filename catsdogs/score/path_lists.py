"""Read path lists: the column `path` of Parquet and CSV files, or the lines of text files.

A folder whose name ends like such a file is a list too: its files are read in order, as Spark, Dask and Ray Data write
them, also in subfolders. Names in it that begin with `_` or `.` are ignored, such as `_SUCCESS` and `_metadata`.
"""

import codecs
import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.errors import InputError

PARQUET = (".parquet",)
CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
TEXT = (".txt", ".txt.gz")
DELIMITERS = ",;\t|"
GZIP_MAGIC = b"\x1f\x8b"
COMMENT = "# "  # a file may have a name that begins with # alone

# The number of each line or row, and the path in it.
NumberedPaths = Iterator[tuple[int, object]]


def is_path_list(uri: str) -> bool:
    """Whether `--input` is a path list; its name decides."""
    return uri.lower().endswith(PARQUET + CSV + TEXT)


class PathList:
    """The paths in a path list, in its order. Its files are read once and stay in memory.

    Raises:
        InputError: there is no such list, or it cannot be read; while iterating: a file of it cannot be parsed.
    """

    def __init__(self, uri: str) -> None:
        self._files = list(_read_files(uri))
        if not self._files:
            raise InputError(f"cannot read {uri}: expected a path list or a folder of path lists; check --input")

    def __iter__(self) -> Iterator[str]:
        for uri, content in self._files:
            yield from _iter_paths(uri, content)


def _read_files(uri: str) -> Iterator[tuple[str, bytes]]:
    """Read the file, or the files of the folder; a listing of a remote file may not be permitted."""
    found = None if storage.is_local(uri) else storage.read_versioned(uri)
    if found is not None:
        yield uri, found[0]
        return
    extensions = next(kind for kind in (PARQUET, CSV, TEXT) if uri.lower().endswith(kind))
    listing = storage.Listing(uri, collect_folders=False, extensions=extensions)
    for entry in listing:
        if not any(name.startswith("_") for name in listing.relative(entry.path).split("/")):
            yield entry.path, storage.read_bytes(entry.path)
    if listing.unlisted:
        path, reason = next(iter(listing.unlisted.items()))
        raise InputError(f"{uri}: cannot list {path} in this path list: {reason}")


def _iter_paths(uri: str, content: bytes) -> Iterator[str]:
    is_parquet = uri.lower().endswith(PARQUET)
    unit, number = "row" if is_parquet else "line", 0
    try:
        for number, path in _iter_parquet(content) if is_parquet else _iter_text_file(uri, content):
            if not isinstance(path, str) or not path:
                reason = f"expected a path in every row of its column path, got {path!r} in {unit} {number}"
                raise InputError(f"{uri}: {reason}")
            yield storage.absolute(path)
    except (EOFError, OSError, ValueError, csv.Error, pa.ArrowException, zlib.error) as error:
        place = f" after {unit} {number}" if number else ""
        raise InputError(f"{uri}: cannot read this path list{place}: {' '.join(str(error).split())}") from error


def _iter_parquet(content: bytes) -> NumberedPaths:
    file = pq.ParquetFile(pa.BufferReader(content))
    _find_column(file.schema_arrow.names)
    batches = (batch["path"].to_pylist() for batch in file.iter_batches(columns=["path"]))
    for number, path in enumerate(itertools.chain.from_iterable(batches), 1):
        yield number, path.decode() if isinstance(path, bytes) else path


def _find_column(names: list[str]) -> int:
    if names.count("path") != 1:
        found = "there are several" if "path" in names else f"there is none, only {', '.join(names) or 'other columns'}"
        raise ValueError(f"expected a column named path (in .txt, one path a line): {found}")
    return names.index("path")


def _iter_text_file(uri: str, content: bytes) -> NumberedPaths:
    if content.startswith(GZIP_MAGIC):
        content = gzip.decompress(content)
    lines = io.TextIOWrapper(io.BytesIO(content), _find_encoding(content), newline="\n")
    return _iter_csv(lines, len(content)) if uri.lower().endswith(CSV) else _iter_lines(lines)


def _find_encoding(content: bytes) -> str:
    """Return UTF-16 if the content begins with its byte order mark, else UTF-8; ValueError if it is neither."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        reason = f"expected UTF-8, found the byte 0x{byte:02x} in line {line}"
        raise ValueError(f"{reason}; convert it, for example: iconv -f LATIN1 -t UTF-8") from error
    if "\0" in text:
        raise ValueError("expected UTF-8, found zero bytes; save it as UTF-8")
    return encoding


def _iter_csv(lines: io.TextIOWrapper, num_bytes: int) -> NumberedPaths:
    csv.field_size_limit(max(csv.field_size_limit(), num_bytes))  # of the process; the default is 128 KiB
    headers = {}
    for delimiter in DELIMITERS:
        lines.seek(0)
        headers[delimiter] = next(filter(None, csv.reader(lines, delimiter=delimiter)), [])
    delimiter = next((delimiter for delimiter, names in headers.items() if "path" in names), DELIMITERS[0])
    if not headers[delimiter]:
        return
    column = _find_column(headers[delimiter])
    lines.seek(0)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)  # else a stray quote would hide the rows after it
    for row in itertools.islice(filter(None, reader), 1, None):
        yield reader.line_num, row[column] if column < len(row) else None


def _iter_lines(lines: io.TextIOWrapper) -> NumberedPaths:
    for number, line in enumerate(lines, 1):
        path = line.rstrip("\n").removesuffix("\r")
        if path.strip() and not path.startswith(COMMENT):
            yield number, path
