"""Image files -> bytes, or a reason why not.

Every file is read by one request, and again where that broke off. A reason is a status of the output: `not_found`,
`access_denied`, `changed` (another size, etag or modification time than was listed), `read_error`. Missing or expired
credentials and a store that does not answer stop the job instead: they say nothing about an image.
"""

import asyncio
import functools
import hashlib
import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from catsdogs.errors import InputError
from catsdogs.storage.listing import Entry
from catsdogs.storage.objects import NO_LIMIT, TooLongError, check_length, get_object, read_object
from catsdogs.storage.s3 import (
    MISSING,
    REFUSED,
    STORE_ERRORS,
    check_credentials,
    read_error_code,
    split_s3,
    submit,
    to_store_error,
)
from catsdogs.storage.uris import filesystem, fs_path, is_local, local_path

NOWHERE = MISSING | {"NoSuchBucket"}
READS_IN_FLIGHT = 32  # of one process; S3 answers a GET in tens of milliseconds
AHEAD_BYTES = 256 << 20  # of files that are read before they are asked for
UNLISTED_BYTES = 4 << 20  # taken for the size of a file that was not listed


@dataclass(frozen=True, slots=True)
class Fetched:
    """The content of one file, or why there is none.

    Attributes:
        version: of what was read, as an `Entry` has it.
        retries: how often reading was tried again.
    """

    status: str
    image_bytes: bytes | None = None
    error: str | None = None
    version: str | None = None
    retries: int = 0


def fetch(entries: Sequence[Entry], limit_bytes: int = NO_LIMIT) -> list[Fetched]:
    """Read files as they were listed, many at once where they are far.

    Args:
        limit_bytes: a larger file is not read; its status is `decoder_crash`.

    Raises:
        RunError: the credentials are missing, wrong or expired, or the store does not answer.
    """
    return next(fetch_ahead([entries], limit_bytes))


def fetch_ahead(groups: Iterable[Sequence[Entry]], limit_bytes: int = NO_LIMIT) -> Generator[list[Fetched], None, None]:
    """Read groups of files in their order, those that are far before they are asked for, up to `AHEAD_BYTES`.

    A group waits for its slowest file; meanwhile the next are read. Raises as `fetch` does.
    """
    todo = deque(groups)
    started: deque[_Group] = deque()
    try:
        while todo or started:
            while todo and sum(group.num_bytes for group in started) < AHEAD_BYTES:
                started.append(_Group(todo.popleft(), limit_bytes))
            yield started[0].wait()
            started.popleft()
    finally:
        for group in started:
            group.cancel()


def listed_bytes(entry: Entry) -> int:
    """Tell what a file is likely to take."""
    return UNLISTED_BYTES if entry.size_bytes is None else entry.size_bytes


class _Group:
    """Files that are being read together, those that are here once they are waited for."""

    def __init__(self, entries: Sequence[Entry], limit_bytes: int) -> None:
        self._entries = entries
        self._limit_bytes = limit_bytes
        self.num_bytes = sum(map(listed_bytes, entries))
        remote = [entry for entry in entries if _is_s3(entry)]
        self._reading = submit(_fetch_many, remote, limit_bytes) if remote else None

    def wait(self) -> list[Fetched]:
        bodies = iter(self._reading.result() if self._reading else ())
        return [
            next(bodies) if _is_s3(entry) else _fetch_local_or_fsspec(entry, self._limit_bytes)
            for entry in self._entries
        ]

    def cancel(self) -> None:
        if self._reading:
            self._reading.cancel()


def _is_s3(entry: Entry) -> bool:
    return entry.path.startswith("s3://")


def read_bytes(uri: str) -> bytes:
    """Read a whole small file.

    Raises:
        InputError: it is not there or may not be read.
        RunError: as `fetch` does.
    """
    fetched = fetch([Entry(path=uri)])[0]
    if fetched.image_bytes is None:
        raise InputError(f"cannot read {uri}: {fetched.error}")
    return fetched.image_bytes


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """Read a whole small file and name its version, for `replace_bytes`; None where nothing is there.

    Raises:
        InputError: it may not be read.
        RunError: as `fetch` does.
    """
    try:
        if is_local(uri):
            content, found = _read_local(uri, NO_LIMIT)
            return content, local_version(found)
        if uri.startswith("s3://"):
            return read_object(*split_s3(uri))
        content = filesystem(uri).cat_file(fs_path(uri))
        return content, hashlib.sha256(content).hexdigest()
    except (*STORE_ERRORS, ValueError) as error:
        check_credentials(error)
        if _status(error) == "not_found":
            return None
        raise to_store_error(error, f"cannot read {uri}: {_message(error)}") from error


def local_version(found: os.stat_result) -> str:
    """Name the version of a local file; one that replaces it is another."""
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def _read_local(uri: str, limit_bytes: int) -> tuple[bytes, os.stat_result]:
    with open(local_path(uri), "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a regular file")
        check_length(found.st_size, limit_bytes)
        return file.read(), found


def _fetch_local_or_fsspec(entry: Entry, limit_bytes: int) -> Fetched:
    if not is_local(entry.path):
        return _fetch_other(entry)
    try:
        content, found = _read_local(entry.path, limit_bytes)
    except (OSError, ValueError) as error:  # a ValueError: the name holds a zero byte
        return Fetched(_status(error), error=_message(error))
    return _unchanged(entry, content, str(found.st_mtime_ns))


def _open_at_once(path: str | bytes, flags: int) -> int:
    """Open without waiting for a pipe's other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _fetch_other(entry: Entry) -> Fetched:
    fs = filesystem(entry.path)
    try:
        content = fs.cat_file(fs_path(entry.path))
    except Exception as error:  # noqa: BLE001 - the file systems' errors share no base class
        return Fetched(_status(error), error=_message(error))
    return _unchanged(entry, content, entry.version)


@functools.cache
def _gate(_: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return asyncio.Semaphore(READS_IN_FLIGHT)


async def _fetch_many(entries: Sequence[Entry], limit_bytes: int) -> list[Fetched]:
    async def one(entry: Entry) -> Fetched:
        async with _gate(asyncio.get_running_loop()):
            return await _fetch_s3(entry, limit_bytes)

    reads = [asyncio.create_task(one(entry)) for entry in entries]
    try:
        return await asyncio.gather(*reads)
    except BaseException:  # the job stops: nobody waits for the other files
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        raise


async def _fetch_s3(entry: Entry, limit_bytes: int) -> Fetched:
    try:
        content, etag, retries = await get_object(
            *split_s3(entry.path), size_bytes=entry.size_bytes, etag=entry.version, limit_bytes=limit_bytes
        )
    except STORE_ERRORS as error:
        check_credentials(error)
        return Fetched(_status(error), error=_message(error))
    return _unchanged(entry, content, etag, retries)


def _unchanged(entry: Entry, content: bytes, version: str | None, retries: int = 0) -> Fetched:
    if entry.size_bytes is not None and len(content) != entry.size_bytes:
        reason = f"has {len(content)} bytes, was listed with {entry.size_bytes}"
        return Fetched("changed", error=reason, retries=retries)
    if entry.version is not None and version != entry.version:
        return Fetched("changed", error="replaced since it was listed", retries=retries)
    return Fetched("ok", content, version=version, retries=retries)


def _status(error: BaseException) -> str:
    if isinstance(error, TooLongError):
        return "decoder_crash"
    if isinstance(error, FileNotFoundError | NotADirectoryError) or read_error_code(error) in NOWHERE:
        return "not_found"
    return "access_denied" if isinstance(error, PermissionError) or read_error_code(error) in REFUSED else "read_error"


def _message(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
