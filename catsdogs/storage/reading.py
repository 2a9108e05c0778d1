"""Image files -> bytes, or a reason why not.

Every file is read by one request. A reason is a status of the output: `not_found`, `access_denied`, `changed`
(another size, etag or modification time than was listed), `read_error`. Missing or expired credentials stop
the job instead: they say nothing about an image.
"""

import asyncio
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsspec.asyn import sync

from catsdogs.errors import InputError
from catsdogs.storage.listing import Entry
from catsdogs.storage.s3 import STORE_ERRORS, check_credentials, get_object, split_s3
from catsdogs.storage.uris import filesystem, fs_path, is_local, local_path

READS_IN_FLIGHT = 32  # of one process; S3 answers a GET in tens of milliseconds


@dataclass(frozen=True, slots=True)
class Fetched:
    """The content of one file, or why there is none."""

    status: str
    image_bytes: bytes | None = None
    error: str | None = None


def fetch(entries: Sequence[Entry]) -> list[Fetched]:
    """Read files as they were listed, many at once where they are far.

    Raises:
        RunError: the credentials are missing, wrong or expired.
    """
    remote = [entry for entry in entries if entry.path.startswith("s3://")]
    if not remote:
        return [_fetch_local(entry) if is_local(entry.path) else _fetch_other(entry) for entry in entries]
    fs = filesystem("s3://")
    bodies = dict(zip([e.path for e in remote], sync(fs.loop, _fetch_many, fs, remote), strict=True))
    return [bodies[entry.path] if entry.path in bodies else fetch([entry])[0] for entry in entries]


def read_bytes(uri: str) -> bytes:
    """Read a whole small file.

    Raises:
        InputError: it is not there or may not be read.
        RunError: the credentials are missing, wrong or expired.
    """
    fetched = fetch([Entry(path=uri)])[0]
    if fetched.image_bytes is None:
        raise InputError(f"cannot read {uri}: {fetched.error}")
    return fetched.image_bytes


def _fetch_local(entry: Entry) -> Fetched:
    try:
        with open(local_path(entry.path), "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return Fetched("read_error", error="not a regular file")
            content = file.read()
    except (OSError, ValueError) as error:  # a ValueError: the name holds a zero byte
        return Fetched(_status(error), error=_words(error))
    return _unchanged(entry, content, str(found.st_mtime_ns))


def _open_at_once(path: str | bytes, flags: int) -> int:
    """Open without waiting for a pipe's other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _fetch_other(entry: Entry) -> Fetched:
    fs = filesystem(entry.path)
    try:
        content = fs.cat_file(fs_path(entry.path))
    except Exception as error:  # noqa: BLE001 - the file systems' errors share no base class
        return Fetched(_status(error), error=_words(error))
    return _unchanged(entry, content, entry.version)


async def _fetch_many(fs: Any, entries: Sequence[Entry]) -> list[Fetched]:
    gate = asyncio.Semaphore(READS_IN_FLIGHT)

    async def one(entry: Entry) -> Fetched:
        async with gate:
            return await _fetch_s3(fs, entry)

    return await asyncio.gather(*map(one, entries))


async def _fetch_s3(fs: Any, entry: Entry) -> Fetched:
    try:
        content, etag = await get_object(fs, *split_s3(entry.path))
    except STORE_ERRORS as error:
        check_credentials(error)
        return Fetched(_status(error), error=_words(error))
    return _unchanged(entry, content, etag)


def _unchanged(entry: Entry, content: bytes, version: str | None) -> Fetched:
    if entry.size_bytes is not None and len(content) != entry.size_bytes:
        return Fetched("changed", error=f"has {len(content)} bytes, was listed with {entry.size_bytes}")
    if entry.version is not None and version != entry.version:
        return Fetched("changed", error="replaced since it was listed")
    return Fetched("ok", content)


def _status(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "not_found"
    return "access_denied" if isinstance(error, PermissionError) else "read_error"


def _words(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
