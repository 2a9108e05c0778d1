"""Read one file: its content, or a status that says why there is none.

The statuses are those of the output: `not_found`, `access_denied`, `read_error`, `too_large`, and `changed` if the
size, S3 etag or local modification time differs from the listing; of a file in another store, only the size is
compared. A remote file is read by one request, which is retried. Missing or expired S3 credentials and an S3 store that
does not respond stop the job, because they say nothing about a file.
"""

import hashlib
import logging
import os
import stat
from dataclasses import dataclass

from catsdogs.errors import RunError
from catsdogs.storage.entries import Entry
from catsdogs.storage.event_loop import run_sync
from catsdogs.storage.limits import MAX_FILE_BYTES, TooLongError, check_length
from catsdogs.storage.objects import get_object
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
from catsdogs.text import redact_queries

NOT_FOUND = MISSING | {"NoSuchBucket"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetched:
    """The content of one file and its version, in the form of `Entry.version`; or the reason why there is none."""

    status: str
    content: bytes | None = None
    error: str | None = None
    version: str | None = None
    retries: int = 0


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
        content, version = _read(uri)
    except (*STORE_ERRORS, ValueError) as error:
        check_credentials(error)
        if _status(error) == "not_found":
            return None
        raise to_store_error(error, f"cannot read {uri}: {_message(error)}") from error
    if not version:
        raise RunError(f"cannot read {uri} to replace it: the store sends no ETag; check or update the store")
    return content, version


def _read(uri: str) -> tuple[bytes, str]:
    """Read a file and its version for `replace_bytes`; raises what the store raises."""
    if is_local(uri):
        content, found = _read_local(uri, MAX_FILE_BYTES)
        return content, local_write_version(found)
    if uri.startswith("s3://"):
        content, etag, _ = run_sync(get_object, *split_s3(uri), limit_bytes=MAX_FILE_BYTES)
        return content, etag
    content, _ = run_sync(read_file, uri, MAX_FILE_BYTES)
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
        content = file.read(found.st_size + 1)
        if len(content) > found.st_size:  # also a file in /proc, which has the size 0
            raise OSError("it grew while it was read")
        return content, found


def _open_nonblocking(path: str | bytes, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def fetch_local(entry: Entry, limit_bytes: int) -> Fetched:
    """Read a listed local file."""
    try:
        content, found = _read_local(entry.path, _limit(entry, limit_bytes))
    except (OSError, ValueError) as error:  # a ValueError if the name contains a zero byte
        return _failed(entry, error)
    return _check_unchanged(entry, content, str(found.st_mtime_ns))


async def fetch_remote(entry: Entry, limit_bytes: int) -> Fetched:
    """Read a listed file of a store."""
    version = entry.version
    try:
        if entry.path.startswith("s3://"):
            content, version, retries = await get_object(
                *split_s3(entry.path), size_bytes=entry.size_bytes, etag=entry.version, limit_bytes=limit_bytes
            )
        else:
            content, retries = await read_file(entry.path, _limit(entry, limit_bytes))
    except STORE_ERRORS as error:
        check_credentials(error)
        return _failed(entry, error)
    return _check_unchanged(entry, content, version, retries)


def _limit(entry: Entry, limit_bytes: int) -> int:
    """Return how much of a file is read: a listed file that became larger has changed."""
    return limit_bytes if entry.size_bytes is None else min(limit_bytes, entry.size_bytes)


def _check_unchanged(entry: Entry, content: bytes, version: str | None, retries: int = 0) -> Fetched:
    if entry.size_bytes is not None and len(content) != entry.size_bytes:
        reason = f"has {len(content)} bytes, was listed with {entry.size_bytes}"
        return Fetched("changed", error=reason, retries=retries)
    if entry.version is not None and version != entry.version:
        return Fetched("changed", error="replaced since it was listed", retries=retries)
    return Fetched("ok", content, version=version, retries=retries)


def _failed(entry: Entry, error: BaseException) -> Fetched:
    logger.debug("cannot read %s", entry.path, exc_info=error)
    if isinstance(error, TooLongError) and entry.size_bytes is not None and error.num_bytes > entry.size_bytes:
        return Fetched("changed", error=f"has at least {error.num_bytes} bytes, was listed with {entry.size_bytes}")
    return Fetched(_status(error), error=_message(error))


def _status(error: BaseException) -> str:
    if isinstance(error, TooLongError):
        return "too_large"
    if isinstance(error, FileNotFoundError | NotADirectoryError) or read_error_code(error) in NOT_FOUND:
        return "not_found"
    return "access_denied" if isinstance(error, PermissionError) or read_error_code(error) in REFUSED else "read_error"


def _message(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(redact_queries(reason).split()) or type(error).__name__
