"""Whose fault a failed request to S3 is, and how long to go on asking.

Throttling, timeouts and broken connections say something about the store: they are asked again with growing, random
pauses (full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/) as long as the store
answers anything. Where only one key fails, that key is given up. Where nothing comes through, the job stops.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from catsdogs.errors import RunError

MAX_ATTEMPTS = 30  # of one key, while others come through
BASE_S, CAP_S = 0.1, 5.0  # the longest pause before the first, and before any further try
MOVING_CAP_S = 1.0  # the same while others come through: a batch waits for its slowest key
PATIENCE_S = 300.0  # without an answer of any kind, or with one key throttled
FIRST_PATIENCE_S = 20.0  # where this process never had any: the address may be wrong
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


class BrokenBodyError(OSError):
    """An answer whose body is not the object."""


def transport_errors() -> tuple[type[Exception], ...]:
    """Name what says that an answer did not get through, or not whole."""
    import aiohttp  # not above: 0.2 s of the start of every process that reads from no store

    return (
        BotoConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        ReadTimeoutError,
        ResponseStreamingError,
        aiohttp.ClientError,
        TimeoutError,
        ConnectionError,
        BrokenBodyError,
    )


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may get through later."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        return code in RETRYABLE_CODES or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, transport_errors())


@dataclass
class _Answers:
    """When this process last had a good answer from the store, None before the first; whether it had any."""

    last_s: float | None = None
    heard: bool = False


contact = _Answers()


async def with_retries(make_request: Callable[[], Awaitable[T]], probe: Callable[[], Awaitable[Any]]) -> tuple[T, int]:
    """Ask until there is an answer; the answer, and how often it was asked again.

    Args:
        ask: makes the request.
        canary: another small request, which shows whether the store answers at all.

    Raises:
        Exception: as `ask` raised it: what no repetition mends, or a key that kept failing.
        RunError: the store does not answer.
    """
    began = time.monotonic()
    attempts = 0
    while True:
        try:
            result = await make_request()
        except Exception as error:
            contact.heard = contact.heard or isinstance(error, ClientError)
            if not is_retryable(error):
                if isinstance(error, ClientError):
                    contact.last_s = time.monotonic()
                raise
            attempts += 1
            await _wait_before_retry(error, attempts, began, probe)
        else:
            contact.last_s, contact.heard = time.monotonic(), True
            return result, attempts


async def _wait_before_retry(
    error: Exception, attempts: int, began: float, probe: Callable[[], Awaitable[Any]]
) -> None:
    """Wait for the next try, or raise what ends them."""
    now = time.monotonic()
    patience_s = PATIENCE_S if contact.heard else FIRST_PATIENCE_S
    silent_s = now - max(began, contact.last_s or began)
    given_up = attempts >= MAX_ATTEMPTS and (not _throttles(error) or now - began > PATIENCE_S)
    if given_up or silent_s > patience_s:
        if (contact.last_s or 0.0) > began or await _answers_at_all(probe):
            if given_up:
                raise error
        elif silent_s > patience_s:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"the store does not answer: {reason}; check AWS_ENDPOINT_URL_S3 and the network") from error
    cap_s = min(CAP_S, MOVING_CAP_S) if silent_s < MOVING_CAP_S else CAP_S
    await asyncio.sleep(random.uniform(0, min(cap_s, BASE_S * 2 ** min(attempts, 10))))


def _throttles(error: Exception) -> bool:
    if not isinstance(error, ClientError):
        return False
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) in (429, 503)


async def _answers_at_all(probe: Callable[[], Awaitable[Any]]) -> bool:
    try:
        await probe()
    except Exception as error:  # noqa: BLE001 every answer counts, a refusal too
        if is_retryable(error) or not isinstance(error, ClientError):
            return False
    contact.last_s = time.monotonic()
    return True
