"""Read files: the content, or a status that says why there is none.

The statuses are those of the output: `not_found`, `access_denied`, `read_error`, and `changed` if the size, S3 etag or
local modification time differs from the listing; of a file in another store, only the size is compared. A remote file
is read by one request, which is retried. Missing or expired S3 credentials and an S3 store that does not respond stop
the job, because they say nothing about a file.
"""

import asyncio
import functools
import hashlib
import logging
import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from catsdogs.storage.entries import Entry
from catsdogs.storage.event_loop import run_sync, submit
from catsdogs.storage.objects import NO_LIMIT, TooLongError, check_length, get_object
from catsdogs.storage.other_stores import read_file
from catsdogs.storage.s3 import (
    MISSING,
    REFUSED,
    STORE_ERRORS,
    check_credentials,
    read_error_code,
    split_s3,
    to_store_error,
)
from catsdogs.storage.uris import is_local, local_path

NOT_FOUND = MISSING | {"NoSuchBucket"}
MAX_READS_IN_FLIGHT = 32  # per process; S3 responds to a GET in tens of milliseconds
MAX_AHEAD_BYTES = 256 << 20  # read before the caller needs them
UNLISTED_BYTES = 4 << 20  # the assumed size of a file that was not listed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetched:
    """The content of one file and its version, in the form of `Entry.version`; or the reason why there is none."""

    status: str
    content: bytes | None = None
    error: str | None = None
    version: str | None = None
    retries: int = 0


def fetch(entries: Sequence[Entry], limit_bytes: int = NO_LIMIT) -> list[Fetched]:
    """Read listed files, remote ones concurrently.

    Args:
        limit_bytes: a larger file is not read; its status is `decoder_crash`.
    """
    return next(fetch_ahead([entries], limit_bytes))


def fetch_ahead(groups: Iterable[Sequence[Entry]], limit_bytes: int = NO_LIMIT) -> Generator[list[Fetched], None, None]:
    """Read groups of files in order, and remote files of the next groups ahead, up to `MAX_AHEAD_BYTES`.

    While a group waits for its slowest file, the next groups are read.
    """
    remaining = iter(groups)
    in_flight: deque[_Group] = deque()
    try:
        while True:
            while sum(group.num_bytes for group in in_flight) < MAX_AHEAD_BYTES:
                entries = next(remaining, None)
                if entries is None:
                    break
                in_flight.append(_Group(entries, limit_bytes))
            if not in_flight:
                return
            yield in_flight[0].wait()
            in_flight.popleft()
    finally:
        for group in in_flight:
            group.cancel()


def listed_bytes(entry: Entry) -> int:
    """Return the listed size of a file, or an estimate if it was not listed."""
    return UNLISTED_BYTES if entry.size_bytes is None else entry.size_bytes


class _Group:
    """Files that are read together: remote ones from the start, local ones in `wait`."""

    def __init__(self, entries: Sequence[Entry], limit_bytes: int) -> None:
        self._entries = entries
        self._limit_bytes = limit_bytes
        self.num_bytes = sum(map(listed_bytes, entries))
        remote = [entry for entry in entries if not is_local(entry.path)]
        self._reading = submit(_fetch_many, remote, limit_bytes) if remote else None

    def wait(self) -> list[Fetched]:
        remote = iter(self._reading.result() if self._reading else ())
        return [
            _fetch_local(entry, self._limit_bytes) if is_local(entry.path) else next(remote) for entry in self._entries
        ]

    def cancel(self) -> None:
        if self._reading:
            self._reading.cancel()


def read_bytes(uri: str) -> bytes:
    """Read a small file.

    Raises:
        InputError: it does not exist or must not be read.
        RunError: a later attempt may succeed.
    """
    try:
        return _read(uri)[0]
    except (*STORE_ERRORS, ValueError) as error:  # a ValueError if the name contains a zero byte
        check_credentials(error)
        raise to_store_error(error, f"cannot read {uri}: {_message(error)}") from error


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """Read a small file and its version, for `replace_bytes`; None if it does not exist.

    Raises:
        InputError: it must not be read.
        RunError: as `read_bytes`.
    """
    try:
        return _read(uri)
    except (*STORE_ERRORS, ValueError) as error:
        check_credentials(error)
        if _status(error) == "not_found":
            return None
        raise to_store_error(error, f"cannot read {uri}: {_message(error)}") from error


def _read(uri: str) -> tuple[bytes, str]:
    """Read a file and its version for `replace_bytes`; raises what the store raises."""
    if is_local(uri):
        content, found = _read_local(uri, NO_LIMIT)
        return content, local_write_version(found)
    if uri.startswith("s3://"):
        content, etag, _ = run_sync(get_object, *split_s3(uri))
        return content, etag
    content, _ = run_sync(read_file, uri)
    return content, hashlib.sha256(content).hexdigest()


def local_write_version(found: os.stat_result) -> str:
    """Build the version of a local file that `replace_bytes` compares: `Entry.version` alone may stay the same."""
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def _read_local(uri: str, limit_bytes: int) -> tuple[bytes, os.stat_result]:
    with open(local_path(uri), "rb", opener=_open_nonblocking) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a regular file")
        check_length(found.st_size, limit_bytes)
        return file.read(), found


def _open_nonblocking(path: str | bytes, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _fetch_local(entry: Entry, limit_bytes: int) -> Fetched:
    try:
        content, found = _read_local(entry.path, limit_bytes)
    except (OSError, ValueError) as error:  # a ValueError if the name contains a zero byte
        return _failed(entry, error)
    return _check_unchanged(entry, content, str(found.st_mtime_ns))


@functools.cache  # a semaphore belongs to one event loop; a forked process gets a new loop
def _read_semaphore(_: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return asyncio.Semaphore(MAX_READS_IN_FLIGHT)


async def _fetch_many(entries: Sequence[Entry], limit_bytes: int) -> list[Fetched]:
    async def fetch_one(entry: Entry) -> Fetched:
        async with _read_semaphore(asyncio.get_running_loop()):
            return await _fetch_remote(entry, limit_bytes)

    reads = [asyncio.create_task(fetch_one(entry)) for entry in entries]
    try:
        return await asyncio.gather(*reads)
    except BaseException:  # the job stops, or the caller cancelled the group
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        raise


async def _fetch_remote(entry: Entry, limit_bytes: int) -> Fetched:
    version = entry.version
    try:
        if entry.path.startswith("s3://"):
            content, version, retries = await get_object(
                *split_s3(entry.path), size_bytes=entry.size_bytes, etag=entry.version, limit_bytes=limit_bytes
            )
        else:
            content, retries = await read_file(entry.path, limit_bytes)
    except STORE_ERRORS as error:
        check_credentials(error)
        return _failed(entry, error)
    return _check_unchanged(entry, content, version, retries)


def _check_unchanged(entry: Entry, content: bytes, version: str | None, retries: int = 0) -> Fetched:
    if entry.size_bytes is not None and len(content) != entry.size_bytes:
        reason = f"has {len(content)} bytes, was listed with {entry.size_bytes}"
        return Fetched("changed", error=reason, retries=retries)
    if entry.version is not None and version != entry.version:
        return Fetched("changed", error="replaced since it was listed", retries=retries)
    return Fetched("ok", content, version=version, retries=retries)


def _failed(entry: Entry, error: BaseException) -> Fetched:
    logger.debug("cannot read %s", entry.path, exc_info=error)
    return Fetched(_status(error), error=_message(error))


def _status(error: BaseException) -> str:
    if isinstance(error, TooLongError):
        return "decoder_crash"
    if isinstance(error, FileNotFoundError | NotADirectoryError) or read_error_code(error) in NOT_FOUND:
        return "not_found"
    return "access_denied" if isinstance(error, PermissionError) or read_error_code(error) in REFUSED else "read_error"


def _message(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
