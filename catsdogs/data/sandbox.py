"""Decode images in a child process: a decoder that crashes, exceeds its memory or hangs fails one image.

The child is forked from a process that has imported the decoders, and decodes one group of files after another. It is
not a Ray actor: an actor takes seconds to start, and Ray does not report which image killed it. If the child dies, its
group is decoded file by file to find the image.
"""

import contextlib
import faulthandler
import logging
import mmap
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np

from catsdogs.images import Decoded, ImageArray
from catsdogs.images.decode import import_decoders
from catsdogs.images.pillow import configure_pillow
from catsdogs.schema import OK
from catsdogs.text import shorten

MAX_DECODE_S = 30.0  # for one image
MAX_DECODE_BYTES = 2 << 30  # of a file, and of the child beyond the memory of its parent
MAX_GROUP_BYTES = 16 << 20  # of files that are sent to the child at once
MAX_ATTEMPTS = 2  # for one file: something else may kill the child
OUT_OF_MEMORY_EXIT_CODE = 77
FATAL_SIGNALS = ("SIGABRT", "SIGALRM", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGTERM")
T = TypeVar("T")
logger = logging.getLogger(__name__)


class DecoderBugError(Exception):
    """The decoder raised. Bad files must return a status, so this is a bug; the message has the child's traceback."""


class Decoder(Protocol):
    """Decodes files in the child; compared by value, because a child serves one decoder."""

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode a file to an image of the size of the request's array; `row` seeds augmentation."""


class DecodeRequest(NamedTuple):
    """A file to decode, its row, and the array for its pixels: uint8 (V*S, S, 3), V views of S pixels a side."""

    image_bytes: bytes
    row: int
    pixels: ImageArray


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """The status of a file, its size and its decoding time; the pixels are in the request's array."""

    status: str
    error: str | None
    width: int | None
    height: int | None
    decode_s: float

    def __post_init__(self) -> None:
        if self.error is not None:
            object.__setattr__(self, "error", shorten(self.error))


def decode_in_subprocess(decoder: Decoder, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
    """Decode files in a child process; a file that kills the child gets the status `decoder_crash`."""
    with _lock:
        groups = group_by_bytes(requests, lambda request: len(request.image_bytes), MAX_GROUP_BYTES)
        return [result for group in groups for result in _decode_group(decoder, group)]


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


def _decode_group(decoder: Decoder, group: list[DecodeRequest]) -> list[DecodeResult]:
    started = time.perf_counter()
    code = 0
    for _ in range(MAX_ATTEMPTS if len(group) == 1 else 1):
        child = _get_child(decoder, group)
        try:
            return child.decode(group)
        except (EOFError, OSError):
            code = end_child()
            logger.debug("decoding %d files failed: %s", len(group), _describe_exit(code), exc_info=True)
        if code == -signal.SIGALRM:
            break
    if len(group) > 1:
        return [result for request in group for result in _decode_group(decoder, [request])]
    group[0].pixels[:] = 0
    return [DecodeResult("decoder_crash", _describe_exit(code), None, None, time.perf_counter() - started)]


def _describe_exit(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"decoding took more than {MAX_DECODE_S:g} s"
    if code == OUT_OF_MEMORY_EXIT_CODE:
        return f"decoding ran out of memory (limit {MAX_DECODE_BYTES >> 30} GiB)"
    return f"the decoder died of {signal.Signals(-code).name}" if code < 0 else f"the decoder exited with code {code}"


class _Child:
    """A forked process that decodes and returns pixels through shared memory."""

    def __init__(self, decoder: Decoder, num_bytes: int) -> None:
        self.decoder = decoder
        self.owner = os.getpid()
        self.shared = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        import_decoders()
        self.connection, child_connection = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run_child(decoder, child_connection, self.shared)
        child_connection.close()

    def decode(self, requests: list[DecodeRequest]) -> list[DecodeResult]:
        """Decode files; raises EOFError or OSError if the child is dead."""
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its traceback may be in the pipe
                self.connection.send([request.row for request in requests])
                for request in requests:
                    self.connection.send_bytes(request.image_bytes)
            results: list[DecodeResult] | str = self.connection.recv()
            if isinstance(results, str):
                raise DecoderBugError(f"the decoder raised an exception:\n{results}")
        except (EOFError, OSError):
            raise
        except BaseException:  # for example cancellation: the pipe may have a stale reply
            os.kill(self.pid, signal.SIGKILL)
            end_child()
            raise
        images = self.shared[: len(requests) * requests[0].pixels.size]  # all of one size
        for request, result, pixels in zip(requests, results, np.split(images, len(requests)), strict=True):
            if result.status == OK:
                request.pixels[:] = pixels.reshape(request.pixels.shape)
        return results


_lock = threading.Lock()
_child: _Child | None = None


def _get_child(decoder: Decoder, requests: list[DecodeRequest]) -> _Child:
    global _child
    num_bytes = len(requests) * requests[0].pixels.nbytes
    if _child is not None and _child.owner != os.getpid():  # this process was forked: the child is its parent's
        _child = None
    if _child is not None and (_child.decoder != decoder or len(_child.shared) < num_bytes):
        end_child()
    if _child is None:
        _child = _Child(decoder, num_bytes)
    return _child


def end_child() -> int:
    """Close the child's pipe, so that it exits; return its exit code, or minus the signal that killed it."""
    global _child
    if _child is None:
        return 0
    child, _child = _child, None
    child.connection.close()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    except ChildProcessError:
        return 0


def _run_child(decoder: Decoder, connection: Connection, shared: ImageArray) -> NoReturn:
    """Serve requests until the parent closes the pipe; never return into the parent's code."""
    try:
        signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)  # also limits the setup
        _restrict_child(connection.fileno())
        configure_pillow()
        _serve(decoder, connection, shared)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT_CODE)
    except EOFError:  # the parent has closed the pipe
        os._exit(0)
    except BaseException:  # noqa: BLE001
        with contextlib.suppress(OSError):  # the parent has ended
            connection.send(traceback.format_exc())
        os._exit(1)


def _serve(decoder: Decoder, connection: Connection, shared: ImageArray) -> NoReturn:
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        rows = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)
        contents = [connection.recv_bytes() for _ in rows]
        connection.send(_decode_files(decoder, contents, rows, shared))


def _restrict_child(kept_descriptor: int) -> None:
    """Release the parent's descriptors and signal handlers; limit additional memory to MAX_DECODE_BYTES."""
    faulthandler.disable()
    for name in FATAL_SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    # With an open socket of the parent, its peers would not notice its death.
    os.closerange(3, kept_descriptor)
    os.closerange(kept_descriptor + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(FileNotFoundError):  # only Linux has it
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_DECODE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork


def _decode_files(
    decoder: Decoder, contents: Sequence[bytes], rows: Sequence[int], shared: ImageArray
) -> list[DecodeResult] | str:
    """Decode files into shared memory, one image after the other; return the traceback if the decoder raises."""
    from catsdogs.images.torch_decoders import is_out_of_memory

    results = []
    try:
        for i, (image_bytes, row) in enumerate(zip(contents, rows, strict=True)):
            signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)
            started = time.perf_counter()
            decoded = decoder.decode(image_bytes, row)
            if decoded.image is not None:
                num_bytes = decoded.image.nbytes
                shared[i * num_bytes : (i + 1) * num_bytes] = decoded.image.ravel()
            decode_s = time.perf_counter() - started
            results.append(DecodeResult(decoded.status, decoded.error, decoded.width, decoded.height, decode_s))
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise MemoryError from error
        return traceback.format_exc()
    return results
