"""Commands under test: started, watched, killed, and all that they leave behind ended."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

MARK = "CATSDOGS_FAULT_RUN"  # in the environment of a command and of everything that it starts
START_S = 120.0  # of a server
_living: set["Command"] = set()
_stopping = threading.Event()


class CutError(Exception):
    """A run took too long."""


class StoppedError(Exception):
    """The table is being stopped: nothing new is started."""


def stop() -> None:
    """End every command, and start no more."""
    _stopping.set()
    for command in list(_living):
        command.end()


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server that was started listens.

    Raises:
        RuntimeError: it ended, or did not come.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} did not start: {process.poll()}")


class Command:
    """One command in a process group of its own, with a Ray of its own unless RAY_ADDRESS is given."""

    def __init__(self, words: Sequence[object], log: Path, **environment: str) -> None:
        if _stopping.is_set():
            raise StoppedError
        self.log = log
        self._mark = uuid.uuid4().hex
        self._folder = tempfile.mkdtemp(prefix="cf-")  # short: Ray puts sockets there
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        own = {MARK: self._mark, "RAY_TMPDIR": self._folder, "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=inherited | own | environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        """Run while the context lasts."""
        _living.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """End every process of the command, those too that its death left alone."""
        _living.discard(self)
        self.end()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def end(self) -> None:
        """Kill every process of the command."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def code(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command, not to what it started."""
        self._process.send_signal(number)

    def tell(self, line: str) -> None:
        """Write a line to the command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def wait(self, seconds: float) -> int:
        """Wait for the end.

        Raises:
            CutError: it did not come.
        """
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired as error:
            raise CutError from error

    def runs_for(self, seconds: float) -> bool:
        """Wait; whether the command still runs then."""
        with contextlib.suppress(CutError):
            self.wait(seconds)
        return self.code is None

    def processes(self) -> list[psutil.Process]:
        """Find the living processes of the command."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Find the workers and actors of its Ray that have something to do."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith("ray::") and "IDLE" not in process.cmdline()[0]:
                    found.append(process)
        return found

    def last_line(self) -> str:
        """Quote what the command said last."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].rpartition("\r")[2][:300] if lines else ""
