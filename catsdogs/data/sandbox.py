"""Decode images in a child process: a decoder that crashes, exceeds its memory or hangs fails one image.

    decode_in_subprocess(decoder, requests)   in a Ray task
      _decode_group                           files that are sent at once; repeats the file that killed the child
        _Child.decode, .read_results          send requests, read results (decode_messages.py)
          run_child                           in the child (sandbox_child.py)

The child is forked from a process that has imported the decoders, and decodes one group of files after another. It is
not a Ray actor: an actor takes seconds to start, and Ray does not report which image killed it.
"""

import contextlib
import logging
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from catsdogs.data.decode_budget import MAX_DECODE_S, DecodeBudget
from catsdogs.data.decode_messages import (
    BUG,
    DONE,
    FILE,
    MAX_TRACEBACK_BYTES,
    REQUEST,
    Decoder,
    DecodeRequest,
    DecodeResult,
    InvalidResultError,
    count_results,
    count_shared_bytes,
    read_result,
    unpack_traceback,
    view_shared,
)
from catsdogs.data.sandbox_child import MAX_DECODE_BYTES, OUT_OF_MEMORY_EXIT_CODE, run_child
from catsdogs.images import ImageArray
from catsdogs.images.decode import import_decoders
from catsdogs.schema import OK

MAX_GROUP_BYTES = 16 << 20  # of files that are sent to the child at once
MAX_ATTEMPTS = 2  # for one file: something else may kill the child
# After the limit, for the child's own timer to end it. An image may have switched that off.
GRACE_S = 2.0
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
        error = invalid
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
    logger.debug("decoding a file failed: %s", failure.reason, exc_info=error)
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


class _Child:
    """A forked process that decodes and returns results and pixels through shared memory."""

    def __init__(self, decoder: Decoder, num_bytes: int) -> None:
        self.decoder = decoder
        self.owner = os.getpid()
        self.shared = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self._setup_s = MAX_DECODE_S  # until its first reply
        import_decoders()
        self._socket, child_socket = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            run_child(decoder, child_socket.detach(), self.shared)
        child_socket.close()

    def decode(self, requests: list[DecodeRequest], budget: DecodeBudget) -> EOFError | OSError | None:
        """Decode files and charge the time; return why the child has stopped if it has.

        Raises:
            InvalidResultError: its reply is none.
            DecoderBugError: its reply is a traceback.
        """
        slots, _ = view_shared(self.shared, len(requests), requests[0].pixels.nbytes)
        slots[:, 0] = 0
        try:
            self._send(requests, budget)
            self._wait(slots, budget)
        except (EOFError, OSError) as error:
            return error
        return None

    def read_results(self, requests: list[DecodeRequest]) -> list[DecodeResult]:
        """Read the results and pixels up to the first file that has none; raises InvalidResultError."""
        results = []
        views = view_shared(self.shared, len(requests), requests[0].pixels.nbytes)  # all of one size
        for request, slot, pixels in zip(requests, *views, strict=True):
            result = read_result(slot)
            if result is None:
                break
            if result.status == OK:
                request.pixels[:] = pixels.reshape(request.pixels.shape)
            results.append(result)
        return results

    def close(self) -> None:
        """Close the socket, so that the child ends if it waits for a request."""
        self._socket.close()

    def _send(self, requests: list[DecodeRequest], budget: DecodeBudget) -> None:
        self._socket.settimeout(budget.limit_s + GRACE_S + self._setup_s)
        pixel_bytes = requests[0].pixels.nbytes
        head = REQUEST.pack(len(requests), pixel_bytes, budget.reserve_s, budget.share_s)
        try:
            self._socket.sendall(head + b"".join(FILE.pack(file.row, len(file.image_bytes)) for file in requests))
            for request in requests:
                self._socket.sendall(request.image_bytes)
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("the decoder is dead; its traceback may be in the socket", exc_info=True)

    def _wait(self, slots: ImageArray, budget: DecodeBudget) -> None:
        """Wait until all files are decoded; raises TimeoutError if no file is done within its limit."""
        num_done, is_done = 0, False
        while not is_done:
            started, num_before = time.perf_counter(), num_done
            try:
                is_done = self._receive_reply(budget.limit_s + GRACE_S + self._setup_s)
            except TimeoutError:
                if count_results(slots) <= num_before:
                    raise
            finally:
                num_done = count_results(slots)
                budget.charge(time.perf_counter() - started, num_done - num_before)
                self._setup_s = 0

    def _receive_reply(self, timeout_s: float) -> bool:
        self._socket.settimeout(timeout_s)
        reply = self._socket.recv(1)
        if not reply:
            raise EOFError("the decoder closed its socket")
        if reply == BUG:
            raise unpack_traceback(self._receive_traceback())
        if reply != DONE:
            raise InvalidResultError(f"expected {DONE!r}, got {reply!r}")
        return True

    def _receive_traceback(self) -> bytes:
        """Receive up to MAX_TRACEBACK_BYTES, until the child closes the socket or sends nothing for GRACE_S."""
        self._socket.settimeout(GRACE_S)
        content, deadline = b"", time.monotonic() + MAX_DECODE_S
        with contextlib.suppress(OSError):
            while len(content) < MAX_TRACEBACK_BYTES and time.monotonic() < deadline:
                part = self._socket.recv(MAX_TRACEBACK_BYTES)
                if not part:
                    break
                content += part
        return content


_lock = threading.Lock()
_child: _Child | None = None


def _get_child(decoder: Decoder, requests: list[DecodeRequest]) -> _Child:
    global _child
    num_bytes = count_shared_bytes(len(requests), requests[0].pixels.nbytes)
    if _child is not None and _child.owner != os.getpid():  # this process was forked: the child is its parent's
        _child = None
    if _child is not None and (_child.decoder != decoder or len(_child.shared) < num_bytes):
        end_child()
    if _child is None:
        _child = _Child(decoder, num_bytes)
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
