"""Every crash point of a scoring run: the driver dies after each operation on the disk, then the run resumes.

After the crash every further operation is refused, those of clean-up too, and the process of the lease is gone. Crashes
that leave the same files are tested once. Expected: the rows of an undisturbed run, `verify` passes, no unknown file
exists; and at the crash itself `_SUCCESS` exists only if `verify` passes.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from scoring import check_output, read_rows, run_scoring, write_images

from catsdogs import report
from catsdogs.config import VerifyConfig
from catsdogs.lease import LEASE
from catsdogs.score import verify
from catsdogs.score.plan import REPORT, SUMMARY
from catsdogs.storage import writing

EVERY = 11  # of a resume, each 11th crash point; the first one differs from state to state
TIMED = (LEASE, SUMMARY, REPORT)  # files with times in them
OPERATIONS = ("link", "replace", "unlink", "fsync", "makedirs")


class Crash(BaseException):
    """The driver is dead."""


class Disk:
    """Allows a number of operations, then raises Crash."""

    def __init__(self) -> None:
        self.num_operations = 0
        self._allowed: float = math.inf
        self._lock = threading.Lock()  # parts are committed by threads

    def allow(self, operations: float) -> None:
        """Restart the count."""
        self.num_operations, self._allowed = 0, operations

    def __call__(self, operation: Callable) -> Callable:
        def recorded(*args, **kwargs):
            with self._lock:
                if self.num_operations >= self._allowed:
                    raise Crash
                self.num_operations += 1
            return operation(*args, **kwargs)

        return recorded


@pytest.fixture
def disk(monkeypatch) -> Disk:
    disk = Disk()
    names = {name: getattr(os, name) for name in dir(os)} | {name: disk(getattr(os, name)) for name in OPERATIONS}
    monkeypatch.setattr(writing, "os", SimpleNamespace(**names | {"fsync": disk(lambda _: None)}))
    monkeypatch.setattr(writing, "open", disk(open), raising=False)
    monkeypatch.setattr(report, "confidence", lambda *_: report.facts({}))  # drawing takes longer than all else
    lives = itertools.count()
    monkeypatch.setattr(
        "catsdogs.lease.read_start_time", lambda _: str(next(lives))
    )  # the process of an old lease is dead
    return disk


@pytest.fixture
def folder() -> Iterator[Path]:
    """Create a folder in memory if possible, for thousands of small files."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="catsdogs-crashes-", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


def prepare_first(folder: Path) -> dict:
    write_images(folder / "in", **{name: name for name in "abcd"})
    return {}


def prepare_grown(folder: Path) -> dict:
    prepare_first(folder)
    run_scoring(folder / "in", folder / "out")
    write_images(folder / "in", a0="new", b="changed", d="changed", e="new")
    return {}


def prepare_retry(folder: Path) -> dict:
    manifest = folder / "m.txt"
    manifest.write_text("".join(f"{folder}/in/{name}.jpg\n" for name in "abcdef"))
    prepare_first(folder)
    run_scoring(manifest, folder / "out")
    write_images(folder / "in", e="late", f="late")
    return {"source": manifest, "retry_failed": True}


SCENARIOS = {"first": (prepare_first, 4), "grown": (prepare_grown, 6), "retry": (prepare_retry, 6)}


def copy_links(source: Path, target: Path) -> None:
    """Copy a folder with hard links: `score` replaces files, it never changes one in place."""
    shutil.copytree(source, target, copy_function=os.link)


class Trial:
    """A scenario; keeps each different state that a crash leaves."""

    def __init__(self, folder: Path, disk: Disk, name: str) -> None:
        prepare, self._num_rows = SCENARIOS[name]
        self._disk, self._folder = disk, folder
        self._settings = {"source": folder / "in"} | prepare(folder)
        self._output = folder / "out"
        self._output.mkdir(exist_ok=True)
        self._seen: set = set()
        self.states: list[Path] = []
        self._keep()
        self.num_operations = self._score()
        self._expected = read_rows(str(self._output))

    def crash(self, state: Path, operations: int) -> None:
        """Start from a state and crash; if that leaves a new state, resume and check the output."""
        shutil.rmtree(self._output)
        copy_links(state, self._output)
        self._score(operations)
        if (self._output / "_SUCCESS").exists():
            verify(VerifyConfig(output=str(self._output)))
        if self._keep():
            self._score()
            check_output(str(self._output), self._num_rows)
            assert read_rows(str(self._output)) == self._expected

    def _score(self, operations: float = math.inf) -> int:
        self._disk.allow(operations)
        with contextlib.suppress(Crash):
            run_scoring(**self._settings, output=self._output)
        num_operations = self._disk.num_operations
        self._disk.allow(math.inf)
        return num_operations

    def _keep(self) -> bool:
        """Keep the present files; return whether they differ from those of all states, times aside."""
        files = sorted(path for path in self._output.rglob("*") if path.is_file())
        names = [re.sub(r"[.][0-9a-f]{16}[.]catsdogs$", "", str(path.relative_to(self._output))) for path in files]
        contents = [path.name.endswith(TIMED) or path.read_bytes() for path in files]
        state = tuple(zip(names, contents, strict=True))
        if state in self._seen:
            return False
        self._seen.add(state)
        self.states.append(self._folder / f"state{len(self._seen)}")
        copy_links(self._output, self.states[-1])
        return True


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_resumes_from_every_crash_point_to_the_undisturbed_rows(scenario, folder, disk):
    trial = Trial(folder, disk, scenario)
    for operations in range(trial.num_operations):
        trial.crash(trial.states[0], operations)
    assert len(trial.states) > 20
    for i, state in enumerate(list(trial.states)):  # crashes during the resume
        for operations in range(i % EVERY, trial.num_operations, EVERY):
            trial.crash(state, operations)
