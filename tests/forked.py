"""Run code in a separate process without its imports: it is forked from a process that has imported the package.

An interpreter takes 2 to 4 s to import what scoring needs, a fork 0.1 s. Not for code whose imports are tested.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

PRELOADED = ["scoring", "catsdogs.report", "pandas", "s3fs", "catsdogs.storage.s3_listing", "catsdogs.storage.s3_gets"]
OUTPUTS = {1: "stdout", 2: "stderr"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Forked:
    """A process that runs code with a separate `sys.argv` and environment; leaving the context kills it."""

    def __init__(self, code: str, *arguments: str, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="catsdogs-forked-")
        given = (code, arguments, dict(os.environ) | environment, self._folder.name)
        self._process = _context.Process(target=_run, args=given)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._folder.cleanup()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout_s: float) -> "subprocess.CompletedProcess[str]":
        """Return the exit code, stdout and stderr; raises TimeoutError if the process does not end in time."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise TimeoutError(f"the process runs for more than {timeout_s:g} s")
        printed = [Path(self._folder.name, name).read_text() for name in OUTPUTS.values()]
        return subprocess.CompletedProcess([], self._process.exitcode, *printed)


def run_forked(code: str, *arguments: str, timeout_s: float = 60.0, **environment: str) -> str:
    """Run code to its end; return what it printed. It may print no error."""
    with Forked(code, *arguments, **environment) as process:
        done = process.wait(timeout_s)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _run(code: str, arguments: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in OUTPUTS.items():
        with open(f"{folder}/{name}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
