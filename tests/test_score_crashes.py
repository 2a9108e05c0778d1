"""Every crash point of a scoring: dead after each operation on the disk or the store, then resumed.

Dead after k operations is dead before the next; two crashes that leave the same files are one.

A dead driver does nothing more, so after the crash every further operation is refused, those of clean-up too. Its lease
is that of a process that is gone. The oracle: the rows of an undisturbed run, the proof holds, no other file is there;
and at the crash itself `_SUCCESS` stands only where the proof holds.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from scoring import check_output, fill, read_rows, scored

from catsdogs import report
from catsdogs.config import VerifyConfig
from catsdogs.score import lease, verify
from catsdogs.score.lease import LEASE
from catsdogs.score.plan import REPORT, SUMMARY
from catsdogs.storage import writing

EVERY = 7  # crash point of a resume; from one state to the next they shift
TIMED = (LEASE, SUMMARY, REPORT)  # files that tell the time
OPERATIONS = ("link", "replace", "unlink", "fsync", "makedirs")


class Crash(BaseException):
    """The driver is dead."""


class Disk:
    """Lets so many operations through, and then no more."""

    def __init__(self) -> None:
        self.num_operations = 0
        self._allowed: float = math.inf

    def allow(self, operations: float) -> None:
        """Count from here."""
        self.num_operations, self._allowed = 0, operations

    def __call__(self, operation: Callable) -> Callable:
        def recorded(*args, **kwargs):
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
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    monkeypatch.setattr(report, "confidence", lambda *_: report.facts({}))  # its drawing takes longer than all else
    lives = itertools.count()
    monkeypatch.setattr(lease, "started", lambda _: str(next(lives)))  # whoever left a lease is dead
    return disk


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a folder in memory where there is one: thousands of small files come and go."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="catsdogs-crashes-", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


def prepare_first(folder: Path) -> dict:
    fill(folder / "in", **{name: name for name in "abcd"})
    return {}


def prepare_grown(folder: Path) -> dict:
    prepare_first(folder)
    scored(folder / "in", folder / "out")
    fill(folder / "in", a0="new", b="changed", d="changed", e="new")
    return {}


def prepare_retry(folder: Path) -> dict:
    manifest = folder / "m.txt"
    manifest.write_text("".join(f"{folder}/in/{name}.jpg\n" for name in "abcdef"))
    prepare_first(folder)
    scored(manifest, folder / "out")
    fill(folder / "in", e="late", f="late")
    return {"source": manifest, "retry_failed": True}


SCENARIOS = {"first": (prepare_first, 4), "grown": (prepare_grown, 6), "retry": (prepare_retry, 6)}


class Trial:
    """One scenario, of which every state that a crash leaves is kept once."""

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
        """Begin from a state and die; where that leaves a new one, resume, and hold the end against the oracle."""
        shutil.rmtree(self._output)
        shutil.copytree(state, self._output)
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
            scored(**self._settings, output=self._output)
        num_operations = self._disk.num_operations
        self._disk.allow(math.inf)
        return num_operations

    def _keep(self) -> bool:
        """Keep the files that are there; whether they are new but for whose lease it is."""
        files = sorted(path for path in self._output.rglob("*") if path.is_file())
        names = [re.sub(r"[.][0-9a-f]{16}$", "", str(path.relative_to(self._output))) for path in files]
        contents = [path.name.endswith(TIMED) or path.read_bytes() for path in files]
        state = tuple(zip(names, contents, strict=True))
        if state in self._seen:
            return False
        self._seen.add(state)
        self.states.append(self._folder / f"state{len(self._seen)}")
        shutil.copytree(self._output, self.states[-1])
        return True


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_crash_point_resumes_to_the_undisturbed_rows(scenario, folder, disk):
    trial = Trial(folder, disk, scenario)
    for operations in range(trial.num_operations):
        trial.crash(trial.states[0], operations)
    assert len(trial.states) > 20
    for i, state in enumerate(list(trial.states)):  # during the resume too
        for operations in range(i % EVERY, trial.num_operations, EVERY):
            trial.crash(state, operations)
