"""A folder or prefix -> its image files, in order, one at a time.

Order is by path in bytes, which for UTF-8 is the order of code points: S3 lists that way, and a local folder
is walked that way, so nothing is sorted in memory. Links to files count; a linked folder is followed once,
and not at all where its files are listed under their own name anyway.
"""

import os
import stat
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from catsdogs.errors import InputError
from catsdogs.progress import Progress, StageProgress, silent
from catsdogs.storage.objects import list_objects
from catsdogs.storage.s3 import split_s3
from catsdogs.storage.uris import (
    filesystem,
    folder_name,
    fs_path,
    is_local,
    local_path,
    local_uri,
    quoted_uri,
)

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
REPORT_EVERY = 1000  # files; also a page of S3
MAX_DEPTH = 200  # folders below the root; each takes a frame of the stack


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as it was listed; `version` is S3's etag, or the modification time in ns of a local file."""

    path: str
    size_bytes: int | None = None
    version: str | None = None


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out."""
    return name.startswith(".") or name == "__MACOSX"


@dataclass
class Listing:
    """The image files under `root`, listed while it is iterated over; the rest is known afterwards.

    Attributes:
        start_after: a path of an earlier listing; only files that come after it are listed.
        notes_folders: whether `folders` is wanted, which is held in memory.
        folders: names of folders at most two levels under the root, relative to it, hidden ones left out.
        unlisted: what could not be listed, with the reason.
    """

    root: str
    progress: Progress = silent
    folders: set[str] = field(default_factory=set)
    unlisted: dict[str, str] = field(default_factory=dict)
    num_files: int = 0
    start_after: str = ""
    collect_folders: bool = True

    def __iter__(self) -> Iterator[Entry]:
        """List the files.

        Raises:
            InputError: the root is not there or cannot be listed.
        """
        for entry in self._entries():
            self.num_files += 1
            if self.num_files % REPORT_EVERY == 0:
                self.progress(StageProgress("list", self.num_files))
            yield entry
        self.progress(StageProgress("list", self.num_files, self.num_files))

    def relative(self, path: str) -> str:
        """Cut the root off a listed path."""
        if path.startswith("file://"):
            quoted = path[len(quoted_uri(local_path(self.root).rstrip(b"/"))) + 1 :]
            return "/".join(folder_name(urllib.parse.unquote_to_bytes(part)) for part in quoted.split("/"))
        if is_local(path) or path.startswith("s3://"):
            return path[len(self.root.rstrip("/")) + 1 :]
        return fs_path(path)[len(fs_path(self.root).rstrip("/")) + 1 :]

    def _entries(self) -> Iterator[Entry]:
        if is_local(self.root):
            return self._local()
        return self._s3() if self.root.startswith("s3://") else self._other()

    def _add_folder(self, parts: list[str]) -> None:
        for depth in range(1, min(len(parts), 2) + 1) if self.collect_folders else ():
            self.folders.add("/".join(parts[:depth]))

    def _local(self) -> Iterator[Entry]:
        path = local_path(self.root)
        if os.path.isfile(path):
            if not self.start_after:
                yield _local_entry(path, os.stat(path))
        elif os.path.isdir(path):
            start_after = local_path(self.start_after) if self.start_after else b""
            yield from _LocalWalk(self, os.path.realpath(path), start_after).walk(path, [])
        else:
            raise InputError(f"no such file or folder: {self.root}")

    def _s3(self) -> Iterator[Entry]:
        bucket, prefix = split_s3(self.root)
        prefix = f"{prefix}/" if prefix else ""
        found = False
        for item in list_objects(self.root, bucket, prefix, split_s3(self.start_after)[1] if self.start_after else ""):
            found = True
            *parts, name = item["Key"][len(prefix) :].split("/")
            if any(is_hidden(part) for part in parts):
                continue
            self._add_folder(parts)
            if is_image(name):
                yield _s3_entry(bucket, item)
        if not found and not self.start_after:
            yield from (_s3_entry(bucket, item) for item in self._s3_single(bucket, prefix[:-1]))

    def _s3_single(self, bucket: str, key: str) -> Iterator[dict[str, Any]]:
        """Take the root for the name of one object."""
        if key:
            first = next(list_objects(self.root, bucket, key), None)
            if first is not None and first["Key"] == key:
                yield first

    def _other(self) -> Iterator[Entry]:
        fs, root = filesystem(self.root), fs_path(self.root).rstrip("/")
        try:
            found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot list {self.root}: {error}") from error
        for path in sorted(found):
            *parts, name = path[len(root) + 1 :].split("/") if path != root else [path.rpartition("/")[2]]
            if not any(is_hidden(part) for part in parts):
                self._add_folder(parts)
                uri = fs.unstrip_protocol(path)
                if is_image(name) and uri > self.start_after:
                    yield Entry(uri, found[path].get("size"))


def _local_entry(path: bytes, found: os.stat_result) -> Entry:
    return Entry(local_uri(path), found.st_size, str(found.st_mtime_ns))


@dataclass
class _LocalWalk:
    """A depth-first walk that follows each linked folder once."""

    listing: Listing
    root: bytes
    start_after: bytes
    followed: list[bytes] = field(default_factory=list)

    def walk(self, folder: bytes, parts: list[str]) -> Iterator[Entry]:
        self.listing._add_folder(parts)
        if len(parts) > MAX_DEPTH:
            self.listing.unlisted[local_uri(folder)] = f"more than {MAX_DEPTH} folders deep"
            return
        try:
            with os.scandir(folder) as found:
                items = sorted(found, key=_walk_order)
        except OSError as error:
            self.listing.unlisted[local_uri(folder)] = error.strerror or str(error)
            return
        for item in items:
            name = os.fsdecode(item.name)
            if is_hidden(name):
                continue
            if _is_folder(item):
                if self._enter(item):
                    yield from self.walk(item.path, [*parts, folder_name(item.name)])
            elif is_image(name):
                yield from self._file(item)

    def _file(self, item: os.DirEntry[bytes]) -> Iterator[Entry]:
        if item.path <= self.start_after:
            return
        try:
            found = os.stat(item.path)
        except OSError:  # reading it will say why
            yield Entry(local_uri(item.path))
            return
        if stat.S_ISREG(found.st_mode):
            yield _local_entry(item.path, found)
        else:
            self.listing.unlisted[local_uri(item.path)] = "not a regular file"

    def _enter(self, item: os.DirEntry[bytes]) -> bool:
        real = os.path.realpath(item.path)
        owner = self._owner(item)
        if not item.is_symlink() and owner is None:
            return True
        taken = [self.root, *(target for target in self.followed if item.is_symlink() or target != owner)]
        if any(_lists(other, real) for other in taken):
            return False
        if item.is_symlink():
            self.followed.append(real)
        return True

    def _owner(self, item: os.DirEntry[bytes]) -> bytes | None:
        """Find the followed link's target that the walk came here through."""
        if not self.followed:
            return None
        folder = os.path.realpath(os.path.dirname(item.path))
        return next((target for target in self.followed if _inside(folder, target)), None)


def _inside(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def _lists(folder: bytes, path: bytes) -> bool:
    """Whether a walk of `folder` comes through `path`: hidden folders are left out of it."""
    if not _inside(path, folder):
        return False
    return not any(is_hidden(os.fsdecode(name)) for name in path[len(folder) :].split(b"/"))


def _is_folder(item: os.DirEntry[bytes]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link in a circle, or to where we may not look
        return False


def _walk_order(item: os.DirEntry[bytes]) -> bytes:
    return item.name + b"/" if _is_folder(item) else item.name


def _s3_entry(bucket: str, item: dict[str, Any]) -> Entry:
    return Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))
