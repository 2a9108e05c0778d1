"""One run of one pipeline: the command, again after whatever ended it, until it is done or its time is over."""

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

CUT_S = 300.0
MAX_COMMANDS = 6  # of one run, so that a command which fails at once ends too
OURS, STOCK, STOCK_CHECKPOINT, READ_IMAGES = "catsdogs", "stock", "stock + checkpoint", "stock, read_images"


@dataclass
class Trial:
    """A run, and what a fault does to it.

    Attributes:
        usual_s: how long a run takes without faults.
        usual_bytes: what its output takes of a disk.
        injected: how many faults came, as far as the fault itself counts them.
        problems: what the fault's own checks found wrong.
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
    began: float = field(default_factory=time.monotonic)
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._key = f"out/{self.folder.name}"
        self._kept: Mapping[str, bytes] | None = None
        self.output = self.output or (f"s3://{BUCKET}/{self._key}" if self.store else str(self.folder / "out"))

    @property
    def root(self) -> str:
        """Where the images are."""
        return f"s3://{BUCKET}/in" if self.store else str(self.images)

    @property
    def left_s(self) -> float:
        """What is left of the run's time."""
        return self.began + self.cut_s - time.monotonic()

    @property
    def is_ours(self) -> bool:
        """Whether it is catsdogs that runs."""
        return self.pipeline == OURS

    def words(self) -> list[object]:
        """Lay out the command."""
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
        """Start the command; whatever of it is left afterwards is ended."""
        environment = self.environment | (self.store.environment if self.store else {})
        with Command(self.words(), self.folder / "log.txt", **environment) as command:
            yield command

    def once(self, meanwhile: Callable[[Command], None] = lambda _: None) -> int:
        """Run the command to its end while something happens to it; its exit status."""
        with self.command() as command:
            meanwhile(command)
            code = command.wait(self.left_s)
            self.codes.append(code)
            if code:
                self.notes.append(command.last_line())
            return code

    def until_done(self) -> None:
        """Run the command until it ends well."""
        while len(self.codes) < MAX_COMMANDS and (not self.codes or self.codes[-1] != 0):
            self.once()

    def files(self) -> Mapping[str, bytes]:
        """Read what stands in the output, or what was kept of it."""
        if self._kept is not None:
            return self._kept
        if self.store:
            return self.store.read(self._key)
        out = Path(self.output)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def keep(self) -> None:
        """Read the output now: it will not be there later."""
        self._kept = self.files()

    def found(self) -> oracle.Found:
        """Read the output's rows."""
        return oracle.read(self.files(), self.root)

    def clear(self) -> None:
        """Remove what the run wrote."""
        if self.store:
            self.store.clear(self._key)
            self.store.clear(f"{self._key}-ids")
        shutil.rmtree(self.folder, ignore_errors=True)


def cut(run: Callable[[Trial], None], trial: Trial) -> bool:
    """Run a fault; whether its time was over before it was done."""
    try:
        run(trial)
    except CutError:
        return True
    finally:
        trial.wall_s = time.monotonic() - trial.began
    return False
