"""One run of one pipeline: its command, repeated until it succeeds or the time limit is reached."""

import contextlib
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults import oracle
from benchmarks.faults.inputs import SHARD_SIZE, Inputs
from benchmarks.faults.processes import Command, CutError
from benchmarks.faults.store import BUCKET, Store

CUT_S = 300.0  # the time limit of a run
MAX_COMMANDS = 6  # of one run
OURS, STOCK, STOCK_CHECKPOINT, READ_IMAGES = "catsdogs", "stock", "stock + checkpoint", "stock, read_images"


@dataclass
class Trial:
    """One run, and the faults that are injected into it.

    Attributes:
        usual_s: the wall time of a run without faults.
        usual_bytes: the size of its output on a disk.
        injected: the number of faults, where the scenario counts them.
        codes: the exit status of each command.
        problems: found by the scenario itself.
    """

    pipeline: str
    inputs: Inputs
    images: Path
    folder: Path
    store: Store | None
    rng: random.Random
    usual_s: float
    usual_bytes: int
    environment: dict[str, str] = field(default_factory=dict)
    output: str = ""
    cut_s: float = CUT_S
    injected: int = 0
    codes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._key = f"out/{self.folder.name}"
        self._kept: Mapping[str, bytes] | None = None
        self.output = self.output or (f"s3://{BUCKET}/{self._key}" if self.store else str(self.folder / "out"))

    @property
    def root(self) -> str:
        """The folder or prefix of the images."""
        return f"s3://{BUCKET}/in" if self.store else str(self.images)

    @property
    def left_s(self) -> float:
        """The seconds until the time limit of the run."""
        return self.start + self.cut_s - time.monotonic()

    @property
    def is_ours(self) -> bool:
        """Whether this is a run of catsdogs."""
        return self.pipeline == OURS

    def build_command(self) -> list[object]:
        """Build the command line."""
        common = ["--checkpoint", self.inputs.checkpoint, "--output", self.output]
        if self.is_ours:
            scoring = [Path(sys.executable).with_name("catsdogs"), "score", "--input", self.root]
            return [*scoring, "--shard-size", SHARD_SIZE, *common]
        stock = [sys.executable, "-m", "benchmarks.faults.stock"]
        if self.pipeline == READ_IMAGES:
            return [*stock, "--reader", "images", "--input", self.root, *common]
        manifest = self.inputs.write_manifest(self.folder / "manifest", self.root)
        resume = ["--resume-from", f"{self.output}-ids"] if self.pipeline == STOCK_CHECKPOINT else []
        return [*stock, "--reader", "download", "--input", manifest, *common, *resume]

    @contextlib.contextmanager
    def command(self) -> Iterator[Command]:
        """Start the command; its remaining processes are killed afterwards."""
        environment = self.environment | (self.store.environment if self.store else {})
        with Command(self.build_command(), self.folder / "log.txt", **environment) as command:
            yield command

    def run_once(self, meanwhile: Callable[[Command], None] = lambda _: None) -> int:
        """Run the command and `meanwhile`, and return the exit status of the command."""
        with self.command() as command:
            meanwhile(command)
            code = command.wait(self.left_s)
            self.codes.append(code)
            if code:
                self.notes.append(command.last_line())
            return code

    def run_until_done(self) -> None:
        """Run the command until it succeeds, at most MAX_COMMANDS times."""
        while len(self.codes) < MAX_COMMANDS and (not self.codes or self.codes[-1] != 0):
            self.run_once()

    def read_files(self) -> Mapping[str, bytes]:
        """Read the files of the output, or return those of `keep_output`."""
        if self._kept is not None:
            return self._kept
        if self.store:
            return self.store.read(self._key)
        out = Path(self.output)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def keep_output(self) -> None:
        """Read the output before its disk is removed."""
        self._kept = self.read_files()

    def read_output(self) -> oracle.Found:
        """Read the rows of the output."""
        return oracle.read_output(self.read_files(), self.root)

    def clear(self) -> None:
        """Remove the files of the run."""
        if self.store:
            self.store.clear(self._key)
            self.store.clear(f"{self._key}-ids")
        shutil.rmtree(self.folder, ignore_errors=True)


def run_limited(run: Callable[[Trial], None], trial: Trial) -> bool:
    """Run a trial; whether it ran into its time limit."""
    try:
        run(trial)
    except CutError:
        return True
    finally:
        trial.wall_s = time.monotonic() - trial.start
    return False
