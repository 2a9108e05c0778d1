"""The parent's side of the decoding child: fork it, send it requests, wait for it, read its results.

The child may be under the control of a malicious image: it may send anything, or nothing. So each wait has a limit.
"""

import contextlib
import gc
import logging
import mmap
import os
import socket
import time

import numpy as np

from catsdogs.data.decode_budget import GRACE_S, MAX_DECODE_S, DecodeBudget
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
    read_result,
    unpack_traceback,
    view_shared,
)
from catsdogs.data.sandbox_child import run_child
from catsdogs.images import ImageArray
from catsdogs.images.decode import import_decoders
from catsdogs.schema import OK

logger = logging.getLogger(__name__)


class ChildProcess:
    """A forked process that decodes and returns results and pixels through shared memory."""

    def __init__(self, decoder: Decoder, num_bytes: int) -> None:
        self.decoder = decoder
        self.owner = os.getpid()
        self.shared = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self._is_ready = False  # it replies once after its setup
        import_decoders()
        self._socket, child_socket = socket.socketpair()
        self.pid = _fork()
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
            if not self._is_ready:
                self._is_ready = self._receive_reply(MAX_DECODE_S + GRACE_S)
            self._send(requests, budget)
            self._wait(slots, budget)
        except (EOFError, OSError) as error:
            logger.debug("the decoder stopped", exc_info=True)
            return error.with_traceback(None)  # its frames keep the files in memory
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
        self._socket.settimeout(budget.wait_s)
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
                is_done = self._receive_reply(budget.wait_s)
            except TimeoutError:
                if count_results(slots) <= num_before:
                    raise
            finally:
                num_done = count_results(slots)
                budget.charge(time.perf_counter() - started, num_done - num_before)

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


def _fork() -> int:
    """Fork; the child never collects the parent's garbage.

    Finalizers of the parent would run there. That of a Ray object reference sends a message on the parent's connection,
    whose next request is then lost.
    """
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        pid = os.fork()
        if pid == 0:
            gc.freeze()
        return pid
    finally:
        if is_enabled:
            gc.enable()
