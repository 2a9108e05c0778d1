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

from catsdogs.images import Decoded, Pixels

LIMIT_S = 30.0  # of one image
LIMIT_BYTES = 2 << 30  # beyond what the process holds when it is forked
TOGETHER_BYTES = 16 << 20  # of files that are decoded in one go
TRIES = 2  # of one image alone: its process may have died of something else
OUT_OF_MEMORY = 77  # exit status
FATAL_SIGNALS = ("SIGABRT", "SIGALRM", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGTERM")
T = TypeVar("T")


class Decoder(Protocol):
    """What is done with an image; compared by value, since one child serves one decoder."""

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode a file to pixels of the model's size; `row` is its number, where randomness goes by it."""


class File(NamedTuple):
    """A file to be decoded, its row's number, and where its pixels go: uint8 (V*S, S, 3), V views."""

    image_bytes: bytes
    row: int
    pixels: Pixels


class Answer(NamedTuple):
    """What became of a file; its pixels are where they were to go, and how long they took is in seconds."""

    status: str
    error: str | None
    width: int | None
    height: int | None
    decode_s: float


def decode_apart(decoder: Decoder, files: Sequence[File]) -> list[Answer]:
    """Decode files in a child process; `decoder_crash` for one that it died of."""
    with _lock:
        groups = groups_of(files, lambda file: len(file.image_bytes), TOGETHER_BYTES)
        return [answer for group in groups for answer in _decode_group(decoder, group)]


def groups_of(files: Iterable[T], bytes_of: Callable[[T], int], most_bytes: int) -> Iterator[list[T]]:
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


def _decode_group(decoder: Decoder, group: list[File]) -> list[Answer]:
    if len(group) > 1:
        child = _child_for(decoder, group)
        try:
            return child.decode(group)
        except (EOFError, OSError):
            _end_child()
    return [_decode_alone(decoder, file) for file in group]


def _decode_alone(decoder: Decoder, file: File) -> Answer:
    began = time.perf_counter()
    code = 0
    for _ in range(TRIES):
        child = _child_for(decoder, [file])
        try:
            return child.decode([file])[0]
        except (EOFError, OSError):
            code = _end_child()
            if code == -signal.SIGALRM:
                break
    file.pixels[:] = 0
    return Answer("decoder_crash", _how(code), None, None, time.perf_counter() - began)


def _how(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"decoding took more than {LIMIT_S:g} s"
    if code == OUT_OF_MEMORY:
        return f"decoding took more than {LIMIT_BYTES >> 30} GiB of memory"
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

    def decode(self, files: list[File]) -> list[Answer]:
        """Decode files.

        Raises:
            EOFError, OSError: the child is dead.
        """
        try:
            answers = self._ask(files)
        except (EOFError, OSError):
            raise
        except BaseException:  # a cancelled task: what the child says next answers nobody's question
            os.kill(self.pid, signal.SIGKILL)
            _end_child()
            raise
        images = _cut(self.shared, files)
        for file, answer, image in zip(files, answers, images, strict=True):
            if answer.status == "ok":
                file.pixels[:] = image
        return answers

    def _ask(self, files: list[File]) -> list[Answer]:
        self.connection.send([file.row for file in files])
        for file in files:
            self.connection.send_bytes(file.image_bytes)
        answers: list[Answer] = self.connection.recv()
        return answers


_lock = threading.Lock()
_children: list[_Child] = []  # one at most


def _cut(shared: Pixels, files: Sequence[File]) -> Pixels:
    """View the images of files, which are of one size, in the memory that both sides see."""
    shape = (len(files), *files[0].pixels.shape)
    return shared[: math.prod(shape)].reshape(shape)


def _child_for(decoder: Decoder, files: list[File]) -> _Child:
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


def _serve(decoder: Decoder, connection: Connection, shared: Pixels) -> NoReturn:
    """Decode until the parent is gone."""
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # also where something else hangs than a decoder
        _limit(connection)
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)
            rows = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
            contents = [connection.recv_bytes() for _ in rows]
            answers = []
            for i, (row, image_bytes) in enumerate(zip(rows, contents, strict=True)):
                began = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
                decoded = decoder.decode(image_bytes, row)
                if decoded.image is not None:
                    size = decoded.image.nbytes
                    shared[i * size : (i + 1) * size] = decoded.image.ravel()
                decode_s = time.perf_counter() - began
                answers.append(Answer(decoded.status, decoded.error, decoded.width, decoded.height, decode_s))
            connection.send(answers)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:  # noqa: BLE001 nothing may get back into what was forked
        os._exit(1)


def _limit(connection: Connection) -> None:
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
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT_BYTES, held + LIMIT_BYTES))
    import torch

    torch.set_num_threads(1)  # the threads of the parent's pool are not here
