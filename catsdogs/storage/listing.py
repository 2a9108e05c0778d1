"""List the image files of a folder or prefix in path order, one at a time; or the files with other extensions.

Paths are ordered by their bytes, which for UTF-8 is the order of code points. S3 lists in this order and a local
folder is walked in it, so only other stores are listed at once and sorted in memory. Linked files count. A linked
folder is followed once, and not at all if the listing reaches its files under their own names.
"""

import logging
import os
import stat
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fsspec.core import url_to_fs

from catsdogs.errors import InputError
from catsdogs.progress import Progress, StageProgress, silent
from catsdogs.storage.entries import EXTENSIONS, Entry, is_hidden, is_listed
from catsdogs.storage.http_listing import list_files
from catsdogs.storage.http_store import is_http
from catsdogs.storage.other_stores import call, filesystem
from catsdogs.storage.s3 import split_s3, to_store_error
from catsdogs.storage.s3_listing import find_object
from catsdogs.storage.s3_ranges import list_objects_in_ranges
from catsdogs.storage.uris import folder_name, is_local, local_path, local_uri, quoted_uri

REPORT_EVERY = 1000  # files; also a page of S3
SHOWN_OTHER_EXTENSIONS = 5
MAX_FOLDER_DEPTH = 3  # train/train/cats

logger = logging.getLogger(__name__)


@dataclass
class Listing:
    """The image files under `root`. Iterating lists them; the other fields are complete afterwards.

    Attributes:
        folders: paths of the folders at most three levels under the root, relative to it, without hidden ones.
        unlisted: folders and files that could not be listed, with the reason.
        other_files: number of files that are no images, by lower-case extension with its dot, "" without one; hidden
            files are not counted.
        num_files: number of image files.
        start_after: a path of an earlier listing; only files after it are listed and counted.
        collect_folders: whether `folders` is filled.
        extensions: files with these are listed instead of images; in lower case.
    """

    root: str
    progress: Progress = silent
    folders: set[str] = field(default_factory=set)
    unlisted: dict[str, str] = field(default_factory=dict)
    other_files: Counter[str] = field(default_factory=Counter)
    num_files: int = 0
    start_after: str = ""
    collect_folders: bool = True
    extensions: tuple[str, ...] = EXTENSIONS

    def __iter__(self) -> Iterator[Entry]:
        """List the files.

        Raises:
            InputError: the root does not exist or cannot be listed.
        """
        for entry in self._entries():
            self.num_files += 1
            if self.num_files % REPORT_EVERY == 0:
                self.progress(StageProgress("list", self.num_files))
            yield entry
        self.progress(StageProgress("list", self.num_files, self.num_files))

    def relative(self, path: str) -> str:
        """Return a listed path relative to the root."""
        if path.startswith("file://"):
            quoted = path[len(quoted_uri(local_path(self.root).rstrip(b"/"))) + 1 :]
            return "/".join(folder_name(urllib.parse.unquote_to_bytes(part)) for part in quoted.split("/"))
        if is_local(path) or path.startswith("s3://"):
            return path[len(self.root.rstrip("/")) + 1 :]
        fs, root = url_to_fs(self.root)
        return path[len(fs.unstrip_protocol(root).rstrip("/")) + 1 :]

    def describe_other_files(self) -> str:
        """Describe what was listed, such as "looked at 312 files, 0 images: 310 .mov, 2 .txt"."""
        total = self.num_files + self.other_files.total()
        text = f"looked at {total:,} file{'s' * (total != 1)}, {self.num_files:,} image{'s' * (self.num_files != 1)}"
        common = self.other_files.most_common(SHOWN_OTHER_EXTENSIONS)
        counts = [f"{count:,} {extension or 'without extension'}" for extension, count in common]
        rest = self.other_files.total() - sum(count for _, count in common)
        return text + (": " if counts else "") + ", ".join(counts + ([f"{rest:,} others"] if rest else []))

    def _entries(self) -> Iterator[Entry]:
        if is_local(self.root):
            return self._local()
        return self._s3() if self.root.startswith("s3://") else self._fsspec()

    def _add_folder(self, parts: list[str]) -> None:
        """Add a folder, given as its path below the root, to `folders`."""
        for depth in range(1, min(len(parts), MAX_FOLDER_DEPTH) + 1) if self.collect_folders else ():
            self.folders.add("/".join(parts[:depth]))

    def _count_other(self, name: str) -> None:
        if name and not is_hidden(name):  # an S3 key that ends in a slash marks a folder
            self.other_files[os.path.splitext(name)[1].lower()] += 1

    def _local(self) -> Iterator[Entry]:
        path = local_path(self.root)
        if os.path.isfile(path):
            if not self.start_after:
                yield _local_entry(path, os.stat(path))
        elif os.path.isdir(path):
            yield from self._walk(path, local_path(self.start_after) if self.start_after else b"")
        else:
            raise InputError(f"no such file or folder: {self.root}")

    def _walk(self, root: bytes, start_after: bytes) -> Iterator[Entry]:
        """Walk a local folder depth first."""
        links = _LinkedFolders(os.path.realpath(root))
        pending = self._scan(root, [])
        while pending:
            item, parts = pending.pop()
            if _is_folder(item):
                if links.enter(item):
                    pending += self._scan(item.path, [*parts, folder_name(item.name)])
            elif item.path > start_after:
                yield from self._local_file(item)

    def _scan(self, folder: bytes, parts: list[str]) -> list[tuple[os.DirEntry[bytes], list[str]]]:
        """List a folder in reverse order; each item has the path of its folder below the root."""
        self._add_folder(parts)
        try:
            with os.scandir(folder) as found:
                items = sorted(found, key=_walk_order, reverse=True)
        except OSError as error:
            logger.debug("cannot list %s", local_uri(folder), exc_info=True)
            self.unlisted[local_uri(folder)] = error.strerror or str(error)
            return []
        return [(item, parts) for item in items if not is_hidden(os.fsdecode(item.name))]

    def _local_file(self, item: os.DirEntry[bytes]) -> Iterator[Entry]:
        if not is_listed(os.fsdecode(item.name), self.extensions):
            self._count_other(folder_name(item.name))
            return
        try:
            found = os.stat(item.path)
        except OSError:  # reading the file reports the reason
            logger.debug("no size and version of %s", local_uri(item.path), exc_info=True)
            yield Entry(local_uri(item.path))
            return
        if stat.S_ISREG(found.st_mode):
            yield _local_entry(item.path, found)
        elif item.is_symlink():  # reading the file reports the reason
            yield Entry(local_uri(item.path))
        else:
            self.unlisted[local_uri(item.path)] = "not a regular file"

    def _s3(self) -> Iterator[Entry]:
        bucket, prefix = split_s3(self.root)
        prefix = f"{prefix}/" if prefix else ""
        found = False
        start_after = split_s3(self.start_after)[1] if self.start_after else ""
        for item in list_objects_in_ranges(self.root, bucket, prefix, start_after):
            found = True
            *parts, name = item["Key"][len(prefix) :].split("/")
            if any(is_hidden(part) for part in parts):
                continue
            self._add_folder(parts)
            if is_listed(name, self.extensions):
                yield _s3_entry(bucket, item)
            else:
                self._count_other(name)
        if not found and not self.start_after and (single := find_object(self.root)):
            yield _s3_entry(bucket, single)

    def _fsspec(self) -> Iterator[Entry]:
        if "::" in self.root:  # fsspec would chain file systems there
            raise InputError(f"cannot list {self.root}: expected a URI without '::'; list a folder above it")
        fs = filesystem(self.root)
        root = url_to_fs(self.root)[1].rstrip("/")
        found = self._find(root)
        for path in sorted(found):
            *parts, name = path[len(root) + 1 :].split("/") if path != root else [path.rpartition("/")[2]]
            if any(is_hidden(part) for part in parts):
                continue
            self._add_folder(parts)
            uri = fs.unstrip_protocol(path)
            if uri > self.start_after:
                if is_listed(name, self.extensions):
                    yield Entry(uri, found[path].get("size"))
                else:
                    self._count_other(name)

    def _find(self, root: str) -> dict[str, dict[str, Any]]:
        """Find the files of a store that is listed at once, with what is known of each."""
        try:
            if not is_http(root):
                found: dict[str, dict[str, Any]] = call(self.root, "find", detail=True)
                return found
            listing = list_files(root)
        except OSError as error:
            raise to_store_error(error, f"cannot list {self.root}: {error}") from error
        self.unlisted |= listing.unlisted
        return {uri: {} for uri in listing.files}


def _s3_entry(bucket: str, item: dict[str, Any]) -> Entry:
    """Build an entry; a store that leaves out the size or the etag leaves it unknown."""
    return Entry(f"s3://{bucket}/{item['Key']}", item.get("Size"), (item.get("ETag") or "").strip('"') or None)


def find_entry(uri: str) -> Entry:
    """Return a file with its size and version if it is a local file, else with its path alone."""
    if not is_local(uri):
        return Entry(uri)
    path = local_path(uri)
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # reading the file reports the reason; a ValueError if the name has a zero byte
        return Entry(uri)
    return _local_entry(path, found) if stat.S_ISREG(found.st_mode) else Entry(uri)


def _local_entry(path: bytes, found: os.stat_result) -> Entry:
    return Entry(local_uri(path), found.st_size, str(found.st_mtime_ns))


class _LinkedFolders:
    """The folders that a walk has entered: it enters each only once."""

    def __init__(self, root: bytes) -> None:
        self._entered = {root}
        self._starts = [root]  # the root and the targets of the links that were followed

    def enter(self, item: os.DirEntry[bytes]) -> bool:
        """Whether to walk a folder; if so, remember it."""
        real = os.path.realpath(item.path)
        linked = item.is_symlink()
        if real in self._entered or (linked and any(_reaches(start, real) for start in self._starts)):
            return False
        self._entered.add(real)
        if linked:
            self._starts.append(real)
        return True


def _reaches(folder: bytes, path: bytes) -> bool:
    """Whether a walk of `folder`, which ignores hidden folders, reaches `path`."""
    below = path.removeprefix(folder.rstrip(b"/") + b"/")
    return below != path and not any(is_hidden(os.fsdecode(name)) for name in below.split(b"/"))


def _is_folder(item: os.DirEntry[bytes]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself, or into a folder without permission
        logger.debug("not taken for a folder: %s", local_uri(item.path), exc_info=True)
        return False


def _walk_order(item: os.DirEntry[bytes]) -> bytes:
    return item.name + b"/" if _is_folder(item) else item.name
