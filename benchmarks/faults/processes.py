"""Commands under test: start, watch and kill them with all of their processes."""

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

MARK = "CATSDOGS_FAULT_RUN"  # an environment variable that the processes of a command inherit
START_S = 120.0  # of a server
_running: set["Command"] = set()
_stopping = threading.Event()


class CutError(Exception):
    """A command ran into its time limit."""


class StoppedError(Exception):
    """A command was started after `stop_commands`."""


def stop_commands() -> None:
    """Kill every command, and refuse to start others."""
    _stopping.set()
    for command in list(_running):
        command.kill()


def free_port() -> int:
    """Find a port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens on a port.

    Raises:
        RuntimeError: the server ended, or does not listen after START_S seconds.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} did not start: {process.poll()}")


class Command:
    """A command in its own process group; it starts its own Ray, unless `environment` has RAY_ADDRESS."""

    def __init__(self, command: Sequence[object], log: Path, **environment: str) -> None:
        if _stopping.is_set():
            raise StoppedError
        self.log = log
        self._mark = uuid.uuid4().hex
        self._folder = tempfile.mkdtemp(prefix="cf-")  # short: Ray creates sockets there
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        own = {MARK: self._mark, "RAY_TMPDIR": self._folder, "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=inherited | own | environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        """Enter; the command has been started by the constructor."""
        _running.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Kill every process of the command, orphans included."""
        _running.discard(self)
        self.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """Kill every process of the command."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def code(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command, not to its children."""
        self._process.send_signal(number)

    def write_line(self, line: str) -> None:
        """Write a line to the standard input of the command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def wait(self, seconds: float) -> int:
        """Wait for the end of the command, and return its exit status.

        Raises:
            CutError: it still runs after `seconds`.
        """
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired as error:
            raise CutError from error

    def runs_for(self, seconds: float) -> bool:
        """Wait at most `seconds`; whether the command still runs."""
        with contextlib.suppress(CutError):
            self.wait(seconds)
        return self.code is None

    def processes(self) -> list[psutil.Process]:
        """Find the running processes of the command."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Find the workers and actors of its Ray that are not idle."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith("ray::") and "IDLE" not in process.cmdline()[0]:
                    found.append(process)
        return found

    def last_line(self) -> str:
        """Return the last line of the log."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].rpartition("\r")[2][:300] if lines else ""
