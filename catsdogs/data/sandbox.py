"""Decode images in a child process: a decoder that crashes, exceeds its memory or hangs fails one image.

    decode_in_subprocess(decoder, requests)   in a Ray task
      _decode_group                           files that are sent at once; repeats the file that killed the child
        ChildProcess.decode, .read_results    send requests, read results (child_process.py, decode_messages.py)
          run_child                           in the child (sandbox_child.py)

The child is forked from a process that has imported the decoders, and decodes one group of files after another. It is
not a Ray actor: an actor takes seconds to start, and Ray does not report which image killed it.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from catsdogs.data.child_process import ChildProcess
from catsdogs.data.decode_budget import DecodeBudget
from catsdogs.data.decode_messages import (
    Decoder,
    DecodeRequest,
    DecodeResult,
    InvalidResultError,
    count_shared_bytes,
)
from catsdogs.data.sandbox_child import MAX_DECODE_BYTES, OUT_OF_MEMORY_EXIT_CODE

MAX_GROUP_BYTES = 16 << 20  # of files that are sent to the child at once
MAX_ATTEMPTS = 2  # for one file: something else may kill the child
T = TypeVar("T")
logger = logging.getLogger(__name__)


def decode_in_subprocess(
    decoder: Decoder, requests: Sequence[DecodeRequest], budget: DecodeBudget | None = None
) -> list[DecodeResult]:
    """Decode files in a child process; a file that kills the child gets the status `decoder_crash`.

    Args:
        budget: of the batch, if it has more files than these.
    """
    budget = budget or DecodeBudget.for_batch(len(requests))
    with _lock:
        groups = group_by_bytes(requests, lambda request: len(request.image_bytes), MAX_GROUP_BYTES)
        return [result for group in groups for result in _decode_group(decoder, group, budget)]


def group_by_bytes(items: Iterable[T], count_bytes: Callable[[T], int], max_bytes: int) -> Iterator[list[T]]:
    """Split items into groups of at most `max_bytes`, or of one item."""
    group: list[T] = []
    group_bytes = 0
    for item in items:
        num_bytes = count_bytes(item)
        if group and group_bytes + num_bytes > max_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(item)
        group_bytes += num_bytes
    if group:
        yield group


def _decode_group(decoder: Decoder, group: list[DecodeRequest], budget: DecodeBudget) -> list[DecodeResult]:
    """Decode files. If the child fails, another one continues with the first file that has no result."""
    results: list[DecodeResult] = []
    attempts, max_files = 0, len(group)
    while len(results) < len(group):
        requests = group[len(results) :][:max_files]
        done, failure = _decode_once(decoder, requests, budget)
        results += done
        attempts = 0 if done else attempts
        if failure is None or len(done) == len(requests):
            continue
        if isinstance(failure.error, InvalidResultError) and len(requests) > 1:
            max_files = 1  # to find the file that causes it
            continue
        attempts += 1
        if failure.is_final or budget.is_spent or attempts == MAX_ATTEMPTS:
            requests[len(done)].pixels[:] = 0
            results.append(DecodeResult("decoder_crash", failure.reason, None, None, failure.seconds))
            budget.charge(0, num_files=1)
            attempts = 0
    return results


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a child has no result for a file; whether a second attempt would be in vain; the time it took."""

    error: Exception
    reason: str
    is_final: bool
    seconds: float


def _decode_once(
    decoder: Decoder, requests: list[DecodeRequest], budget: DecodeBudget
) -> tuple[list[DecodeResult], _Failure | None]:
    """Let the child decode files; return their results, up to the first file that has none."""
    child = _get_child(decoder, requests)
    started, child_budget = time.perf_counter(), replace(budget)
    error: Exception | None = None
    results: list[DecodeResult] = []
    try:
        error = child.decode(requests, budget)
        results = child.read_results(requests)
    except InvalidResultError as invalid:
        logger.debug("the decoder sent an invalid result", exc_info=True)
        error = invalid.with_traceback(None)
    except BaseException:  # for example cancellation: the socket may have a stale reply
        end_child()
        raise
    if error is None and len(results) < len(requests):
        error = InvalidResultError("the decoder left out a result")
    if error is None:
        return results, None
    decode_s = sum(result.decode_s for result in results)
    child_budget.charge(decode_s, len(results))
    seconds = max(0.0, time.perf_counter() - started - decode_s)
    failure = _explain_failure(error, end_child(), seconds, child_budget)
    logger.debug("decoding a file failed: %s", failure.reason)
    return results, failure


def _explain_failure(error: Exception, code: int, seconds: float, budget: DecodeBudget) -> _Failure:
    if isinstance(error, InvalidResultError):
        return _Failure(error, "the decoder sent an invalid result", False, seconds)
    if code == -signal.SIGALRM or isinstance(error, TimeoutError):
        return _Failure(error, budget.describe_excess(), True, seconds)
    if code == OUT_OF_MEMORY_EXIT_CODE:
        reason = f"decoding ran out of memory (limit {MAX_DECODE_BYTES >> 30} GiB)"
    elif code < 0:
        reason = f"the decoder died of {signal.Signals(-code).name}"
    else:
        reason = f"the decoder exited with code {code}"
    return _Failure(error, reason, False, seconds)


_lock = threading.Lock()
_child: ChildProcess | None = None


def _get_child(decoder: Decoder, requests: list[DecodeRequest]) -> ChildProcess:
    global _child
    num_bytes = count_shared_bytes(len(requests), requests[0].pixels.nbytes)
    if _child is not None and _child.owner != os.getpid():  # this process was forked: the child is its parent's
        _child = None
    if _child is not None and (_child.decoder != decoder or len(_child.shared) < num_bytes):
        end_child()
    if _child is None:
        _child = ChildProcess(decoder, num_bytes)
    return _child


def end_child() -> int:
    """End the child; return its exit code, or minus the signal that killed it. One that is dead keeps its code."""
    global _child
    if _child is None:
        return 0
    child, _child = _child, None
    child.close()
    try:
        is_dead, status = os.waitpid(child.pid, os.WNOHANG)
        if not is_dead:  # an image may have made it ignore the end of its socket
            os.kill(child.pid, signal.SIGKILL)
            _, status = os.waitpid(child.pid, 0)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status)
