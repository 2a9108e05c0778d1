"""Stores other than S3: every request to them, with its retries and limits.

`http://` and `https://` are read with aiohttp, in the session of fsspec's file system. Everything else is a method of
an fsspec file system, called in a thread. Their errors share no base class, so what they raise becomes an OSError:
FileNotFoundError (404, 410), PermissionError (401, 403), TransientError, which was retried, or StoreError.
"""

import asyncio
import functools
import http.client
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec

from catsdogs.errors import PROGRAMMING_ERRORS, CatsdogsError, InputError
from catsdogs.storage.event_loop import run_sync
from catsdogs.storage.objects import BODY_TIMEOUT_S, MIN_BODY_BYTES_PER_S, NO_LIMIT, TooLongError, check_length
from catsdogs.storage.retrying import (
    MAX_RETRY_AFTER_S,
    TransientError,
    is_retryable_status,
    read_retry_after,
    transport_errors,
)

if TYPE_CHECKING:
    import aiohttp

RETRY_S = 30.0  # from the first attempt to the last; up to MAX_RETRY_AFTER_S if the store says when to try again
BASE_DELAY_S, MAX_DELAY_S = 0.2, 2.0  # upper bounds of the first delay and of any delay
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 20.0  # for a connection; for the next bytes of a response
MAX_THREADS = 8  # per process
T = TypeVar("T")

logger = logging.getLogger(__name__)


class StoreError(OSError):
    """A store refused a request, and will refuse the same request later."""


# A ValueError is a malformed URL or a certificate of another host.
PERMANENT_ERRORS = (
    *(FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(StoreError, TooLongError, ValueError),
)


def filesystem(uri: str) -> Any:
    """Return the fsspec file system of a URI. Its methods take the URI; most of them return paths without the scheme.

    Raises:
        InputError: the scheme is unknown, its package is not installed, or it needs settings that a URI does not have.
    """
    try:
        return fsspec.filesystem(uri.partition("://")[0].lower())
    except Exception as error:
        expected = "expected a scheme that fsspec opens without further settings, such as s3, https, gs, az or hf"
        raise InputError(f"cannot open {uri}: {error}; {expected}") from error


def is_http(uri: str) -> bool:
    """Whether a URI is read by HTTP."""
    return uri.lower().startswith(("http://", "https://"))


def call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the file system of a URI with the URI, with retries; raises OSError."""
    return run_sync(_call, uri, method, *arguments, **options)[0]


async def read_file(uri: str, limit_bytes: int = NO_LIMIT) -> tuple[bytes, int]:
    """Read a file, with retries.

    Args:
        limit_bytes: a larger file raises TooLongError: before all of it is read if the scheme is http or https.

    Returns:
        The content and the number of retries.

    Raises:
        OSError: the file cannot be read.
    """
    if is_http(uri):
        return await _with_retries(functools.partial(_read_http, uri, limit_bytes), f"GET {uri}")
    content, retries = await _call(uri, "cat_file")
    check_length(len(content), limit_bytes)
    return content, retries


async def _call(uri: str, method: str, *arguments: Any, **options: Any) -> tuple[Any, int]:
    loop = asyncio.get_running_loop()

    def call_once() -> Any:  # in each thread, fsspec has another instance of the file system
        return getattr(filesystem(uri), method)(uri, *arguments, **options)

    return await _with_retries(lambda: loop.run_in_executor(_threads(loop), call_once), f"{method} {uri}")


@functools.cache  # a forked process has another loop, and none of the threads
def _threads(_: asyncio.AbstractEventLoop) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, "storage")


async def _read_http(uri: str, limit_bytes: int) -> bytes:
    import aiohttp  # here, because it takes 0.2 s

    fs = filesystem(uri)
    session = await fs.set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    try:
        async with session.get(fs.encode_url(uri), **({"timeout": timeout} | fs.kwargs)) as response:
            if not 200 <= response.status < 300:
                reason = f"HTTP {response.status} {http.client.responses.get(response.status, '')}".strip()
                raise _to_status_error(response.status, reason, response.headers.get("Retry-After"))
            check_length(response.content_length or 0, limit_bytes)
            return await _read_body(response, limit_bytes)
    except (aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects) as error:
        raise StoreError("redirected too often, or to another scheme") from error


async def _read_body(response: "aiohttp.ClientResponse", limit_bytes: int) -> bytes:
    started_s = time.monotonic()
    content = bytearray()
    try:
        async for chunk in response.content.iter_any():
            content += chunk
            check_length(len(content), limit_bytes)
            if time.monotonic() - started_s > BODY_TIMEOUT_S + len(content) / MIN_BODY_BYTES_PER_S:
                raise TimeoutError("it took too long")
    except transport_errors() as error:
        raise TransientError(f"the body broke off after {len(content)} bytes: {error}") from error
    return bytes(content)


async def _with_retries(make_request: Callable[[], Awaitable[T]], name: str) -> tuple[T, int]:
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
        return _to_status_error(status, reason, headers.get("Retry-After"))
    if _is_transient(error):
        return TransientError(reason)
    return error if isinstance(error, OSError) else StoreError(reason)


def _to_status_error(status: int, reason: str, retry_after: str | None) -> OSError:
    if is_retryable_status(status):
        return TransientError(reason, read_retry_after(retry_after))
    if status in (401, 403):
        return PermissionError(reason)
    return FileNotFoundError(reason) if status in (404, 410) else StoreError(reason)


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
