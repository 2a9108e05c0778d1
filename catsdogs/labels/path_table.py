"""Tables of paths, which may have labels: CSV, Parquet and JSON Lines files.

Relative paths start at `--data-dir`, else at the folder of the table. A table on this machine may name files here and
in object stores; one in a store names only files there, because its author chooses what this machine reads. The
scheme of `--data-dir` is allowed, too.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from catsdogs import storage, table_files
from catsdogs.errors import InputError
from catsdogs.labels.labelled_files import normalize_name
from catsdogs.progress import Message, Progress
from catsdogs.table_files import Column
from catsdogs.text import format_reason

TABLES = (*table_files.CSV, *table_files.PARQUET, *table_files.JSON_LINES)
PATH = Column(("path", "file_name", "image"))
URLS = ("http", "https")


@dataclass(frozen=True)
class PathTable:
    """A table with a column of paths.

    Attributes:
        base: where relative paths start.
        schemes: that paths may have.
    """

    uri: str
    flag: str
    content: bytes
    base: str
    schemes: frozenset[str]

    @classmethod
    def read(cls, uri: str, flag: str, data_dir: str | None) -> "PathTable":
        if not uri.lower().endswith(TABLES):
            raise InputError(f"{flag} {uri}: expected a name that ends in {', '.join(TABLES)}")
        base = data_dir or storage.parent(uri)
        stores = set(storage.SCHEMES) - {*URLS} if storage.is_local(uri) else set()
        schemes = frozenset({storage.find_scheme(uri), storage.find_scheme(base)} | stores)
        return cls(uri, flag, storage.read_bytes(uri), base, schemes)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def unit(self) -> str:
        return "row" if self.uri.lower().endswith(table_files.PARQUET) else "line"

    def relative(self, path: str) -> str:
        """Return a path relative to the base, or the path itself if it is elsewhere."""
        base = f"{self.base.rstrip('/')}/"
        if storage.is_local(path) and storage.is_local(base):
            is_below = storage.local_path(path).startswith(storage.local_path(base))
        else:
            is_below = path.startswith(base)
        return self._listing.relative(path) if is_below else path

    @functools.cached_property
    def _listing(self) -> storage.Listing:
        return storage.Listing(self.base)  # never iterated: for its relative paths

    def iter_rows(self, columns: Sequence[Column]) -> Iterator[tuple[Any, ...]]:
        """Iterate over the numbers and values of the rows; the first value is the absolute path."""
        number = 0
        try:
            for number, (path, *values) in table_files.iter_rows(self.uri, self.content, columns):
                yield number, self._resolve(path, number), *map(_parse, values)
        except table_files.READ_ERRORS as error:
            place = f" after {self.unit} {number}" if number else ""
            raise InputError(
                f"{self.flag} {self.uri}: cannot read this table{place}: {format_reason(error)}"
            ) from error

    def iter_paths(self) -> Iterator[str]:
        """Iterate over the absolute paths of the rows."""
        return (path for _, path, *_ in self.iter_rows((PATH,)))

    def _resolve(self, path: object, number: int) -> str:
        place = f"{self.flag} {self.uri}: {self.unit} {number}"
        if not isinstance(path, str) or not path:
            raise InputError(f"{place}: expected a path, got {path!r:.100}")
        if storage.is_local(path) and not path.startswith(("/", "file://")):
            path = storage.join(self.base, path)
        if storage.find_scheme(path) not in self.schemes:
            raise InputError(
                f"{place}: expected a relative path or one of {self._describe_schemes()}, got {path[:200]}"
            )
        try:
            return storage.absolute(path)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error

    def _describe_schemes(self) -> str:
        names = sorted(self.schemes - {"file"})
        return ", ".join([*(["this machine"] if "file" in self.schemes else []), *(f"{name}://" for name in names)])


@dataclass(frozen=True)
class Exclusion:
    """The files of a table with paths that are left out."""

    uri: str = ""
    paths: frozenset[str] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, uri: str | None, data_dir: str | None) -> "Exclusion":
        """Read a table; without one, nothing is excluded.

        Raises:
            InputError: the table cannot be read.
        """
        if uri is None:
            return cls()
        table = PathTable.read(uri, "--exclude", data_dir)
        paths = frozenset(table.iter_paths())
        return cls(uri, paths, {"exclude": table.sha256})

    def filter(self, entries: Sequence[storage.Entry], progress: Progress) -> list[storage.Entry]:
        """Return the files that are not excluded, and report how many are."""
        if not self.uri:
            return list(entries)
        kept = [entry for entry in entries if entry.path not in self.paths]
        num_found = len(entries) - len(kept)
        progress(Message(f"{num_found:,} of the {len(self.paths):,} images in {self.uri} are left out"))
        if not kept:
            raise InputError(f"--exclude {self.uri} leaves out all {len(entries):,} images; expected some to stay")
        return kept


def _parse(value: object) -> str:
    """Return a label, a split or a group as text without white space around it; "" for none."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float) and value.is_integer():  # of a column of numbers in which some were missing
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(f"expected text or a whole number as label, split or group, got {value!r:.100}")
    return normalize_name(str(value).strip())
