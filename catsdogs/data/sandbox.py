"""Decoding in a process of its own: a decoder that crashes, eats memory or hangs costs one image.

The child is forked from a process that has imported everything, and serves it block after block. It is not a Ray actor:
those take seconds to start, and Ray does not tell which image one died of. Where it dies, its images are decoded one by
one, which shows whose fault it was.
"""

import contextlib
import faulthandler
import math
import mmap
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np

from catsdogs.images import Decoded, ImageArray

MAX_DECODE_S = 30.0  # of one image
MAX_DECODE_BYTES = 2 << 30  # beyond what the process holds when it is forked
GROUP_BYTES = 16 << 20  # of files that are decoded in one go
MAX_ATTEMPTS = 2  # of one image alone: its process may have died of something else
OUT_OF_MEMORY_EXIT_CODE = 77  # exit status
FATAL_SIGNALS = ("SIGABRT", "SIGALRM", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGTERM")
T = TypeVar("T")


class Decoder(Protocol):
    """What is done with an image; compared by value, since one child serves one decoder."""

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode a file to pixels of the model's size; `row` is its number, where randomness goes by it."""


class DecodeRequest(NamedTuple):
    """A file to be decoded, its row's number, and where its pixels go: uint8 (V*S, S, 3), V views."""

    image_bytes: bytes
    row: int
    pixels: ImageArray


class DecodeResult(NamedTuple):
    """What became of a file; its pixels are where they were to go, and how long they took is in seconds."""

    status: str
    error: str | None
    width: int | None
    height: int | None
    decode_s: float


def decode_in_subprocess(decoder: Decoder, files: Sequence[DecodeRequest]) -> list[DecodeResult]:
    """Decode files in a child process; `decoder_crash` for one that it died of."""
    with _lock:
        groups = group_by_bytes(files, lambda file: len(file.image_bytes), GROUP_BYTES)
        return [result for group in groups for result in _decode_group(decoder, group)]


def group_by_bytes(files: Iterable[T], bytes_of: Callable[[T], int], most_bytes: int) -> Iterator[list[T]]:
    """Cut files into groups of so many bytes, or one."""
    group: list[T] = []
    group_bytes = 0
    for file in files:
        num_bytes = bytes_of(file)
        if group and group_bytes + num_bytes > most_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(file)
        group_bytes += num_bytes
    if group:
        yield group


def _decode_group(decoder: Decoder, group: list[DecodeRequest]) -> list[DecodeResult]:
    if len(group) > 1:
        child = _get_child(decoder, group)
        try:
            return child.decode(group)
        except (EOFError, OSError):
            _end_child()
    return [_decode_alone(decoder, file) for file in group]


def _decode_alone(decoder: Decoder, file: DecodeRequest) -> DecodeResult:
    began = time.perf_counter()
    code = 0
    for _ in range(MAX_ATTEMPTS):
        child = _get_child(decoder, [file])
        try:
            return child.decode([file])[0]
        except (EOFError, OSError):
            code = _end_child()
            if code == -signal.SIGALRM:
                break
    file.pixels[:] = 0
    return DecodeResult("decoder_crash", _describe_exit(code), None, None, time.perf_counter() - began)


def _describe_exit(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"decoding took more than {MAX_DECODE_S:g} s"
    if code == OUT_OF_MEMORY_EXIT_CODE:
        return f"decoding took more than {MAX_DECODE_BYTES >> 30} GiB of memory"
    return f"the decoder died of {signal.Signals(-code).name}" if code < 0 else f"the decoder ended with status {code}"


class _Child:
    """A forked process that decodes; pixels come back through memory that both see."""

    def __init__(self, decoder: Decoder, num_bytes: int) -> None:
        self.decoder = decoder
        self.owner = os.getpid()
        self.shared = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        import catsdogs.images.augment  # noqa: F401 not above: torch; before the fork, or every child would wait for it

        self.connection, theirs = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(decoder, theirs, self.shared)
        theirs.close()

    def decode(self, files: list[DecodeRequest]) -> list[DecodeResult]:
        """Decode files.

        Raises:
            EOFError, OSError: the child is dead.
        """
        try:
            results = self._request(files)
        except (EOFError, OSError):
            raise
        except BaseException:  # a cancelled task: what the child says next answers nobody's question
            os.kill(self.pid, signal.SIGKILL)
            _end_child()
            raise
        images = _cut(self.shared, files)
        for file, result, image in zip(files, results, images, strict=True):
            if result.status == "ok":
                file.pixels[:] = image
        return results

    def _request(self, files: list[DecodeRequest]) -> list[DecodeResult]:
        self.connection.send([file.row for file in files])
        for file in files:
            self.connection.send_bytes(file.image_bytes)
        results: list[DecodeResult] = self.connection.recv()
        return results


_lock = threading.Lock()
_children: list[_Child] = []  # one at most


def _cut(shared: ImageArray, files: Sequence[DecodeRequest]) -> ImageArray:
    """View the images of files, which are of one size, in the memory that both sides see."""
    shape = (len(files), *files[0].pixels.shape)
    return shared[: math.prod(shape)].reshape(shape)


def _get_child(decoder: Decoder, files: list[DecodeRequest]) -> _Child:
    num_bytes = len(files) * files[0].pixels.nbytes
    if _children and _children[0].owner != os.getpid():  # forked: it is the parent's
        _children.clear()
    if _children and (_children[0].decoder != decoder or len(_children[0].shared) < num_bytes):
        _end_child()
    if not _children:
        _children.append(_Child(decoder, num_bytes))
    return _children[0]


def _end_child() -> int:
    """Let the child end, if it has not; its exit status, or the negative number of the signal it died of."""
    child = _children.pop()
    child.connection.close()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    except ChildProcessError:
        return 0


def _serve(decoder: Decoder, connection: Connection, shared: ImageArray) -> NoReturn:
    """Decode until the parent is gone."""
    try:
        signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)  # also where something else hangs than a decoder
        _restrict_child(connection)
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)
            rows = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)
            contents = [connection.recv_bytes() for _ in rows]
            results = []
            for i, (row, image_bytes) in enumerate(zip(rows, contents, strict=True)):
                began = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)
                decoded = decoder.decode(image_bytes, row)
                if decoded.image is not None:
                    size = decoded.image.nbytes
                    shared[i * size : (i + 1) * size] = decoded.image.ravel()
                decode_s = time.perf_counter() - began
                results.append(DecodeResult(decoded.status, decoded.error, decoded.width, decoded.height, decode_s))
            connection.send(results)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT_CODE)
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:  # noqa: BLE001 nothing may get back into what was forked
        os._exit(1)


def _restrict_child(connection: Connection) -> None:
    """Give up what is the parent's; die at once and without a trace where something goes wrong."""
    faulthandler.disable()
    for name in FATAL_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    # An open socket of the parent's would keep its death from those who watch it.
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(FileNotFoundError):  # only Linux tells
        with open("/proc/self/statm") as file:
            decoded_cache = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (decoded_cache + MAX_DECODE_BYTES, decoded_cache + MAX_DECODE_BYTES))
    import torch

    torch.set_num_threads(1)  # the threads of the parent's pool are not here
