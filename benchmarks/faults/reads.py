"""Count how often files on the local disk are opened by any process, by inotify of Linux."""

import ctypes
import os
import struct
import threading
from pathlib import Path
from typing import Self

# Closing is watched too: the kernel merges two identical events in a row, such as two openings of one file.
IN_OPEN, IN_CLOSE_NOWRITE, IN_ISDIR, IN_Q_OVERFLOW = 0x20, 0x10, 0x40000000, 0x4000
EVENT = struct.Struct("iIII")


class OpenCounter:
    """Counts openings of files under a folder while its context is open."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.num_opens = 0
        self.overflowed = False

    def __enter__(self) -> Self:
        """Watch every folder that exists now."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        for folder, _, _ in os.walk(self._root):
            libc.inotify_add_watch(self._fd, os.fsencode(folder), IN_OPEN | IN_CLOSE_NOWRITE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._count, name="open-counter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()
        os.close(self._fd)

    def _count(self) -> None:
        while not self._stop.wait(0.02):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                events = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            at = 0
            while at < len(events):
                _, mask, _, length = EVENT.unpack_from(events, at)
                at += EVENT.size + length
                self.num_opens += bool(mask & IN_OPEN and not mask & IN_ISDIR)
                self.overflowed |= bool(mask & IN_Q_OVERFLOW)
