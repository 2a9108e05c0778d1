"""The decoding child: takes away its own rights, then decodes one group of files after another.

It decodes untrusted bytes with C libraries, one of which may have a bug that lets an image run its own code. So before
the first file it gives up what it does not need: the environment, open files and sockets, and new ones of all kinds.
"""

import contextlib
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import time
import traceback
from io import BufferedReader
from typing import NoReturn

from catsdogs.data.decode_budget import MAX_DECODE_S, DecodeBudget
from catsdogs.data.decode_messages import (
    DONE,
    FILE,
    REQUEST,
    Decoder,
    DecodeResult,
    pack_traceback,
    view_shared,
    write_result,
)
from catsdogs.data.seccomp import restrict_system_calls
from catsdogs.images import ImageArray
from catsdogs.images.pillow import configure_pillow

MAX_DECODE_BYTES = 2 << 30  # of the child, beyond the memory of its parent
OUT_OF_MEMORY_EXIT_CODE = 77
FATAL_SIGNALS = ("SIGABRT", "SIGALRM", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGTERM")
ANONYMOUS = "/dev/zero (deleted)"  # shared memory without a file, as of the results
SOCKET = 3  # the descriptor after stdin, stdout and stderr
logger = logging.getLogger(__name__)


def run_child(decoder: Decoder, socket: int, shared: ImageArray) -> NoReturn:
    """Serve requests until the parent closes the socket; never return into the parent's code."""
    try:
        signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)  # also limits the setup
        os.dup2(socket, SOCKET)
        with open(SOCKET, "rb", closefd=False) as requests:
            configure_pillow()
            restrict_process()
            while True:
                os.write(SOCKET, DONE)  # also once after the setup
                _serve(decoder, requests, shared)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT_CODE)
    except EOFError:  # the parent has closed the socket
        os._exit(0)
    except BaseException:  # noqa: BLE001
        with contextlib.suppress(OSError):  # the parent has ended
            os.write(SOCKET, pack_traceback(traceback.format_exc()))
        os._exit(1)


def restrict_process() -> None:
    """Give up files, shared memory, signal handlers and environment of the parent, and the right to open anything."""
    faulthandler.disable()
    for name in FATAL_SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    is_logging = logger.isEnabledFor(logging.DEBUG)
    _close_descriptors(keep_stderr=is_logging)
    _unmap_shared_files()
    os.environ.clear()
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    _limit_resources(is_logging)
    try:
        restrict_system_calls()
    except OSError as error:
        logger.debug("decoders can open files and sockets: %s", error)


def _unmap_shared_files() -> None:
    """Unmap the files that the parent shares with other processes: above all Ray's object store, which has pickles."""
    try:
        with open("/proc/self/maps") as file:
            mappings = [line.split(maxsplit=5) for line in file.read().splitlines()]
    except FileNotFoundError:  # only Linux has it
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for addresses, rights, _, _, _, *path in mappings:
        if not rights.endswith("s") or path == [ANONYMOUS]:
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        if libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(end - start)):
            raise OSError(ctypes.get_errno(), f"cannot unmap {addresses} {path}")


def _close_descriptors(keep_stderr: bool) -> None:
    """Keep SOCKET, and stderr if it is a log.

    With an open socket of the parent, its peers would not notice its death.
    """
    os.closerange(SOCKET + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if keep_stderr else (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _limit_resources(is_logging: bool) -> None:
    """Limit additional memory to MAX_DECODE_BYTES, allow no further descriptors, and no file to grow but a log."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not is_logging:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(FileNotFoundError):  # only Linux has it
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_DECODE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOCKET + 1, SOCKET + 1))


def _serve(decoder: Decoder, requests: BufferedReader, shared: ImageArray) -> None:
    """Decode one group of files into shared memory, one image after the other."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    num_files, pixel_bytes, reserve_s, share_s = REQUEST.unpack(_read(requests, REQUEST.size))
    signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_S)
    budget = DecodeBudget(reserve_s, share_s)
    files = [FILE.unpack(_read(requests, FILE.size)) for _ in range(num_files)]
    contents = [_read(requests, num_bytes) for _, num_bytes in files]
    for (row, _), image_bytes, slot, pixels in zip(
        files, contents, *view_shared(shared, num_files, pixel_bytes), strict=True
    ):
        signal.setitimer(signal.ITIMER_REAL, budget.limit_s)
        result = _decode(decoder, image_bytes, row, pixels)
        budget.charge(result.decode_s, num_files=1)
        write_result(slot, result)


def _read(requests: BufferedReader, num_bytes: int) -> bytes:
    content = requests.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError
    return content


def _decode(decoder: Decoder, image_bytes: bytes, row: int, pixels: ImageArray) -> DecodeResult:
    """Decode one file; raises MemoryError if torch lacks memory."""
    from catsdogs.images.torch_decoders import is_out_of_memory

    started = time.perf_counter()
    try:
        decoded = decoder.decode(image_bytes, row)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError from error
        raise
    if decoded.image is not None:
        pixels[:] = decoded.image.ravel()
    decode_s = time.perf_counter() - started
    return DecodeResult(decoded.status, decoded.error, decoded.width, decoded.height, decode_s)
