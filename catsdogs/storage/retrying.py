"""Retries of S3 requests with backoff, and which errors of any store are retryable.

Throttling, timeouts and broken connections are retried with exponential backoff and full jitter
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). If only one key keeps failing, its error
is raised. If the store responds to no request, the job stops.
"""

import asyncio
import contextlib
import email.utils
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as BotoConnectionError

from catsdogs.errors import RunError

MAX_ATTEMPTS = 30  # for one key, while other requests succeed
BASE_DELAY_S, MAX_DELAY_S = 0.1, 5.0  # upper bounds of the first delay and of any delay
MAX_DELAY_WHILE_HEALTHY_S = 1.0  # while other requests succeed: a batch waits for its slowest key
NO_RESPONSE_TIMEOUT_S = 300.0  # without a response, or with one key throttled
FIRST_RESPONSE_TIMEOUT_S = 20.0  # before the first response of this process: the address may be wrong
MAX_RETRY_AFTER_S = 120.0  # of a delay that the store asks for
RETRYABLE_CODES = {
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
T = TypeVar("T")

logger = logging.getLogger(__name__)


class BrokenBodyError(OSError):
    """The body of a response is incomplete or is not the object."""


class TransientError(OSError):
    """A store other than S3 failed; the same request may succeed later, after `retry_after_s` if that is not 0."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def transport_errors() -> tuple[type[Exception], ...]:
    """List the errors of a response that did not arrive, or not completely."""
    import aiohttp  # here, because it takes 0.2 s, also in processes that read local files only

    return (
        BotoConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        aiohttp.ClientError,
        TimeoutError,
        ConnectionError,
        BrokenBodyError,
        TransientError,
    )


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return code in RETRYABLE_CODES or is_retryable_status(_read_http_status(error))
    return isinstance(error, transport_errors())


def is_retryable_status(status: int) -> bool:
    """Whether a request with this HTTP status may succeed later: a timeout, throttling, an error of the server."""
    return status in (408, 429) or (status >= 500 and status != 501)


def read_retry_after(header: str | None) -> float:
    """Read the seconds to wait from a `Retry-After` header, a number or a date; 0 without one (RFC 9110, 10.2.3)."""
    if header is None:
        return 0.0
    if header.isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):  # an OverflowError for a year or a time zone that does not exist
        return 0.0


@dataclass
class StoreHealth:
    """Responses of the store to this process."""

    last_response_s: float = 0.0  # monotonic time of the last one that needed no retry
    ever_responded: bool = False  # errors included


store_health = StoreHealth()
_last_retry_s = math.inf  # monotonic time after which nothing is retried


@contextlib.contextmanager
def limit_retries(seconds: float) -> Iterator[None]:
    """Retry for these seconds only, in all threads: an interrupted command does not wait for a store that is gone."""
    global _last_retry_s
    before, _last_retry_s = _last_retry_s, time.monotonic() + seconds
    try:
        yield
    finally:
        _last_retry_s = before


async def with_retries(
    make_request: Callable[[], Awaitable[T]], probe: Callable[[], Awaitable[Any]], name: str = "request"
) -> tuple[T, int]:
    """Make a request until it succeeds.

    Args:
        probe: a small request that shows whether the store responds at all.
        name: of the request, for the log.

    Returns:
        The result and the number of retries.

    Raises:
        Exception: the request's error, if it is not retryable or the key keeps failing.
        RunError: the store does not respond.
    """
    started_s = time.monotonic()
    retries = 0
    while True:
        try:
            result = await make_request()
        except Exception as error:
            store_health.ever_responded |= isinstance(error, ClientError)
            if not is_retryable(error):
                if isinstance(error, ClientError):
                    store_health.last_response_s = time.monotonic()
                raise
            retries += 1
            logger.debug("%s: attempt %d failed", name, retries, exc_info=True)
            await _wait_before_retry(error, retries, started_s, probe)
        else:
            store_health.last_response_s, store_health.ever_responded = time.monotonic(), True
            return result, retries


async def _wait_before_retry(
    error: Exception, attempts: int, started_s: float, probe: Callable[[], Awaitable[Any]]
) -> None:
    """Sleep before the next attempt; raise if there is none."""
    now_s = time.monotonic()
    if now_s > _last_retry_s:
        raise error
    timeout_s = NO_RESPONSE_TIMEOUT_S if store_health.ever_responded else FIRST_RESPONSE_TIMEOUT_S
    silent_s = now_s - max(started_s, store_health.last_response_s)
    give_up = attempts >= MAX_ATTEMPTS and (
        _read_http_status(error) not in (429, 503) or now_s - started_s > NO_RESPONSE_TIMEOUT_S
    )
    if give_up or silent_s > timeout_s:
        if store_health.last_response_s > started_s or await _responds(probe):
            if give_up:
                raise error
        elif silent_s > timeout_s:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"the store does not answer: {reason}; check AWS_ENDPOINT_URL_S3 and the network") from error
    healthy = silent_s < MAX_DELAY_WHILE_HEALTHY_S
    max_delay_s = min(MAX_DELAY_S, MAX_DELAY_WHILE_HEALTHY_S) if healthy else MAX_DELAY_S
    delay_s = random.uniform(0, min(max_delay_s, BASE_DELAY_S * 2 ** min(attempts, 10)))
    await asyncio.sleep(max(delay_s, min(_read_s3_retry_after(error), MAX_RETRY_AFTER_S)))


def _read_s3_retry_after(error: BaseException) -> float:
    headers = (
        error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(error, ClientError) else {}
    )
    return read_retry_after(headers.get("retry-after"))


def _read_http_status(error: BaseException) -> int:
    """Return the HTTP status of a response; 0 if the error is not a response."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(error, ClientError) else 0


async def _responds(probe: Callable[[], Awaitable[Any]]) -> bool:
    try:
        await probe()
    except Exception as error:
        logger.debug("the probe failed", exc_info=True)
        if is_retryable(error) or not isinstance(error, ClientError):
            return False
    store_health.last_response_s = time.monotonic()
    return True
