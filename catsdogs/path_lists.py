"""Read path lists: the column `path` of Parquet and CSV files, or the lines of text files.

A folder whose name ends like such a file is a list too: its files are read in order, as Spark, Dask and Ray Data write
them, also in subfolders. Names in it that begin with `_` or `.` are ignored, such as `_SUCCESS` and `_metadata`.

Who writes a list chooses what this machine reads. So its paths have the scheme of the list, or are local if it is
local, unless the user allows others.
"""

import hashlib
from collections.abc import Iterator

from catsdogs import storage, table_files
from catsdogs.errors import InputError, RunError

TEXT = (".txt", ".txt.gz")
COMMENT = "# "  # a file may have a name that begins with # alone
PATH = table_files.Column(("path",), hint=" (in .txt, one path a line)")

# The number of each line or row, and the path in it.
NumberedPaths = Iterator[tuple[int, object]]


def is_path_list(uri: str) -> bool:
    """Whether `--input` is a path list; its name decides."""
    return uri.lower().endswith(table_files.PARQUET + table_files.CSV + TEXT)


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
    extensions = next(kind for kind in (table_files.PARQUET, table_files.CSV, TEXT) if uri.lower().endswith(kind))
    listing = storage.Listing(uri, collect_folders=False, extensions=extensions)
    paths = [entry.path for entry in listing]
    if listing.unlisted:
        path, reason = next(iter(listing.unlisted.items()))
        raise InputError(f"{uri}: cannot list {path} in this path list: {reason}")
    return [path for path in paths if not any(name.startswith("_") for name in listing.relative(path).split("/"))]


def _iter_paths(uri: str, content: bytes, schemes: set[str]) -> Iterator[str]:
    unit, number = "row" if uri.lower().endswith(table_files.PARQUET) else "line", 0
    try:
        for number, path in _iter_lines(content) if uri.lower().endswith(TEXT) else _iter_column(uri, content):
            if not isinstance(path, str) or not path:
                reason = f"expected a path in every row of its column path, got {path!r} in {unit} {number}"
                raise InputError(f"{uri}: {reason}")
            yield _check_path(path, schemes, f"{uri}: {unit} {number}")
    except table_files.READ_ERRORS as error:
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


def _iter_lines(content: bytes) -> NumberedPaths:
    text = table_files.LimitedLines(table_files.open_text(content))
    for number, line in enumerate(text, 1):
        text.start_record()
        path = line.rstrip("\n").removesuffix("\r")
        if path.strip() and not path.startswith(COMMENT):
            yield number, path


def _iter_column(uri: str, content: bytes) -> NumberedPaths:
    return ((number, path) for number, (path,) in table_files.iter_rows(uri, content, [PATH]))
