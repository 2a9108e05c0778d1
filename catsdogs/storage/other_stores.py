"""Stores other than S3: every request to them, with its retries and limits.

`http://` and `https://` are read by `http_store`. Everything else is a method of an fsspec file system, called in a
thread. Their errors share no base class, so what they raise becomes an OSError: FileNotFoundError (404, 410),
PermissionError (401, 403), TransientError, which was retried, or StoreError.
"""

import asyncio
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from catsdogs.errors import PROGRAMMING_ERRORS, CatsdogsError, InputError
from catsdogs.storage.event_loop import run_sync
from catsdogs.storage.http_store import StoreError, is_http, open_url, read_url, to_status_error
from catsdogs.storage.limits import LISTING_DEADLINE_S, TooLongError, check_length
from catsdogs.storage.retrying import MAX_RETRY_AFTER_S, TransientError

# Other schemes of fsspec run programs, open servers that a host names, need settings beside the URI, or read files of
# this machine without the checks of local paths.
OTHER_SCHEMES = ("http", "https", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss", "memory")
SCHEMES = ("file", "s3", *OTHER_SCHEMES)
RETRY_S = 30.0  # from the first attempt to the last; up to MAX_RETRY_AFTER_S if the store says when to try again
BASE_DELAY_S, MAX_DELAY_S = 0.2, 2.0  # upper bounds of the first delay and of any delay
MAX_THREADS = 8  # per process
EMPTY_RANGE = 416  # the status of the first bytes of an empty file
T = TypeVar("T")

logger = logging.getLogger(__name__)


# A ValueError is a malformed URL or a certificate of another host.
PERMANENT_ERRORS = (
    *(FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(StoreError, TooLongError, ValueError),
)


def filesystem(uri: str) -> Any:
    """Return the fsspec file system of a URI. Its methods take the URI; most of them return paths without the scheme.

    Raises:
        InputError: the scheme is not one of `OTHER_SCHEMES`, or its package is not installed or configured.
    """
    scheme = uri.partition("://")[0].lower()
    if scheme not in OTHER_SCHEMES:
        expected = f"expected a local path or one of the schemes {', '.join(SCHEMES[1:-1])}"
        raise InputError(f"cannot open {uri}: {expected}; copy the files to one of them")
    try:
        return fsspec.filesystem(scheme)
    except Exception as error:
        raise InputError(f"cannot open {uri}: {error}; install and configure the fsspec package of {scheme}") from error


def call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the file system of a URI with the URI, with retries; raises OSError."""
    deadline_s = LISTING_DEADLINE_S if method == "find" else None
    return run_sync(_call, uri, method, *arguments, deadline_s=deadline_s, **options)[0]


async def read_file(uri: str, limit_bytes: int) -> tuple[bytes, int]:
    """Read a file, with retries.

    Args:
        limit_bytes: a larger file raises TooLongError before more of it is in memory.

    Returns:
        The content and the number of retries.

    Raises:
        OSError: the file cannot be read.
    """
    if is_http(uri):
        return await with_retries(lambda: read_url(filesystem(uri), uri, limit_bytes), f"GET {uri}")
    content, retries = await _call(uri, "cat_file", start=0, end=limit_bytes + 1)
    check_length(len(content), limit_bytes)
    return content, retries


def url_exists(uri: str) -> bool:
    """Whether a server has a URL; raises OSError if it says neither."""

    async def open_once() -> None:
        async with open_url(filesystem(uri), uri):
            pass

    try:
        run_sync(with_retries, open_once, f"GET {uri}")
    except FileNotFoundError:
        return False
    return True


async def _call(uri: str, method: str, *arguments: Any, **options: Any) -> tuple[Any, int]:
    loop = asyncio.get_running_loop()

    def call_once() -> Any:  # in each thread, fsspec has another instance of the file system
        try:
            return getattr(filesystem(uri), method)(uri, *arguments, **options)
        except Exception as error:
            if _read_http_status(error) == EMPTY_RANGE and method == "cat_file":
                return b""
            raise

    return await with_retries(lambda: loop.run_in_executor(_threads(loop), call_once), f"{method} {uri}")


@functools.cache  # a forked process has another loop, and none of the threads
def _threads(_: asyncio.AbstractEventLoop) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, "storage")


async def with_retries(make_request: Callable[[], Awaitable[T]], name: str) -> tuple[T, int]:
    """Make a request, again while its error is transient; return the result and the number of retries."""
    started_s = time.monotonic()
    retries = 0
    while True:
        try:
            return await make_request(), retries
        except (CatsdogsError, *PROGRAMMING_ERRORS):
            raise
        except Exception as error:
            failure = _to_os_error(error)
            delay_s = _choose_delay(failure, retries, time.monotonic() - started_s)
            if delay_s is None and failure is error:
                raise
            if delay_s is None:
                raise failure from error
            retries += 1
            logger.debug("%s: attempt %d failed", name, retries, exc_info=True)
        await asyncio.sleep(delay_s)


def _choose_delay(failure: OSError, retries: int, elapsed_s: float) -> float | None:
    """Choose the delay before the next attempt; None if there is none."""
    if not isinstance(failure, TransientError):
        return None
    max_delay_s = min(MAX_DELAY_S, BASE_DELAY_S * 2 ** min(retries, 10))
    delay_s = failure.retry_after_s or random.uniform(max_delay_s / 2, max_delay_s)
    return delay_s if elapsed_s + delay_s <= (MAX_RETRY_AFTER_S if failure.retry_after_s else RETRY_S) else None


def _to_os_error(error: Exception) -> OSError:
    if isinstance(error, TransientError):
        return error
    # The text of aiohttp's timeouts has the URL in it.
    reason = "no response in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    if status := _read_http_status(error):
        headers = getattr(getattr(error, "response", error), "headers", None) or {}
        return to_status_error(status, reason, headers.get("Retry-After"))
    if _is_transient(error):
        return TransientError(reason)
    return error if isinstance(error, OSError) else StoreError(reason)


def _read_http_status(error: Exception) -> int:
    """Read the HTTP status of an error: an attribute of it or of its response, named differently by each package."""
    for source in (error, getattr(error, "response", None)):
        values = (getattr(source, name, None) for name in ("status", "status_code", "code"))
        status = next((value for value in values if isinstance(value, int)), 0)
        if 400 <= status < 600:
            return status
    return 0


def _is_transient(error: Exception) -> bool:
    """Whether an error without HTTP status may be one of the network; Python's own, except OSError, are not."""
    if isinstance(error, PERMANENT_ERRORS):
        return False
    return isinstance(error, OSError | EOFError) or type(error).__module__ != "builtins"
