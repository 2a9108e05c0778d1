"""The rows of the fault table: what each fault does, in how many runs, and which rows are expected."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from benchmarks.faults.cluster import READY
from benchmarks.faults.inputs import POISON, Inputs, is_bad
from benchmarks.faults.oracle import Row, Rows
from benchmarks.faults.processes import Command
from benchmarks.faults.proxy import Fault
from benchmarks.faults.trial import OURS, READ_IMAGES, STOCK, STOCK_CHECKPOINT, Trial

POISON_CODE = str(Path(__file__).parent / "poison")
NUM_BODIES = 200
KILL_EVERY_S, NUM_KILLS = 5.0, 10
MAX_CREDENTIALS_S, MAX_TERMINATE_S = 60.0, 30.0  # in which a command has to end
TMPFS_BYTES = 64 << 20  # enough for the whole output


@dataclass(frozen=True)
class Scenario:
    """One row of the table for each of its pipelines.

    Attributes:
        place: "disk", "s3" or "cluster"; the row is compared with the one without faults in the same place.
        run: runs a trial and injects the fault.
        ours: the number of runs of catsdogs.
        stock: the number of runs of each other pipeline.
        expected: rows that differ from those without faults.
        never_ends: no stock run ends before its time limit, so that more of them run at the same time.
    """

    name: str
    place: str
    run: Callable[[Trial], None]
    ours: int = 5
    stock: int = 5
    expected: Mapping[str, Row] = field(default_factory=dict)
    pipelines: tuple[str, ...] = (OURS, STOCK, STOCK_CHECKPOINT)
    never_ends: bool = False

    def num_runs(self, pipeline: str) -> int:
        """Return the number of runs of a pipeline."""
        return self.ours if pipeline == OURS else self.stock

    def expect(self, reference: Rows, ours: bool) -> Rows:
        """Return the rows that are expected under this fault."""
        unlabelled = {path: row if ours else Row(None, None, None) for path, row in self.expected.items()}
        return reference | unlabelled


def kill_driver(trial: Trial) -> None:
    """Kill the driver at a random moment."""
    with trial.command() as command:
        if command.runs_for(trial.rng.uniform(0, trial.usual_s)):
            command.signal(signal.SIGKILL)
            trial.injected += 1
        trial.codes.append(command.wait(trial.left_s))
    trial.run_until_done()


def terminate(trial: Trial) -> None:
    """Send SIGTERM at a random moment."""

    def meanwhile(command: Command) -> None:
        if command.runs_for(trial.rng.uniform(0, trial.usual_s)):
            command.signal(signal.SIGTERM)
            trial.injected += 1
            start = time.monotonic()
            ended = not command.runs_for(MAX_TERMINATE_S)
            trial.notes.append(f"ended {time.monotonic() - start:.1f} s after SIGTERM")
            if not ended:
                trial.problems.append(f"did not end within {MAX_TERMINATE_S:.0f} s")

    trial.run_once(meanwhile)
    trial.run_until_done()


def kill_workers(trial: Trial) -> None:
    """Kill a random worker or actor every few seconds."""

    def meanwhile(command: Command) -> None:
        while trial.injected < NUM_KILLS and trial.left_s > 0 and command.runs_for(KILL_EVERY_S):
            workers = command.workers()
            if workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    trial.rng.choice(workers).kill()
                    trial.injected += 1

    trial.run_once(meanwhile)
    trial.run_until_done()


@contextlib.contextmanager
def start_cluster(trial: Trial) -> Iterator[Command]:
    """Start a cluster of two nodes for a trial."""
    log = trial.folder / "cluster.txt"
    with Command([sys.executable, "-m", "benchmarks.faults.cluster"], log) as cluster:
        while READY not in log.read_text():
            assert cluster.runs_for(0.1), log.read_text()
        address = log.read_text().partition(READY)[2].split()[0]
        trial.environment["RAY_ADDRESS"] = address
        trial.start = time.monotonic()
        yield cluster


def run_on_cluster(trial: Trial) -> None:
    """Run the command on the cluster."""
    with start_cluster(trial):
        trial.run_until_done()


def kill_raylet(trial: Trial) -> None:
    """Kill the raylet of a node at a random moment; another node is added."""
    with start_cluster(trial) as cluster:

        def meanwhile(command: Command) -> None:
            if command.runs_for(trial.rng.uniform(0, trial.usual_s)):
                cluster.write_line(str(trial.rng.random()))
                trial.injected += 1

        trial.run_once(meanwhile)
        trial.run_until_done()


def fill_disk(trial: Trial) -> None:
    """Write the output to a disk with room for part of it; enlarge the disk after the command has failed."""
    disk = Path(trial.output).parent / "disk"
    disk.mkdir()
    room = int(trial.usual_bytes * trial.rng.uniform(0.1, 0.9))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
    try:
        trial.output = str(disk / "out")
        trial.injected = 1
        code = trial.run_once()
        found = trial.read_output()
        if trial.is_ours and code != 1:
            trial.problems.append(f"ended with {code} where the disk was full")
        trial.problems += [f"{name} is visible, but partly written" for name in found.unreadable]
        subprocess.run(["mount", "-o", f"remount,size={TMPFS_BYTES}", disk], check=True)
        trial.run_until_done()
    finally:
        trial.keep_output()
        subprocess.run(["umount", disk], check=True)


def poison(trial: Trial) -> None:
    """Let one file kill every process that decodes it."""
    trial.environment["PYTHONPATH"] = POISON_CODE
    trial.injected = 1
    trial.run_until_done()


def run_with_faults(trial: Trial, *faults: Fault) -> None:
    """Run the command while the S3 proxy injects faults."""
    assert trial.store is not None
    trial.store.proxy.reset(*faults, seed=trial.rng.randrange(2**32))
    trial.run_until_done()


def slow_down(probability: float, trial: Trial) -> None:
    """Respond to a share of all requests with 503."""
    run_with_faults(trial, Fault("slow_down", probability=probability))


def break_bodies(trial: Trial) -> None:
    """Cut, shorten or reset the first response for NUM_BODIES images."""
    names = trial.rng.sample(trial.inputs.good_names, NUM_BODIES)
    kinds = ("cut", "short", "reset")
    keys = [{f"in/{name}" for name in names[i::3]} for i in range(3)]
    run_with_faults(
        trial,
        *(
            Fault(kind, kinds={"image"}, keys=keys[i], first=1, at_byte=trial.rng.randrange(1, 900))
            for i, kind in enumerate(kinds)
        ),
    )


def slow_bodies(trial: Trial) -> None:
    """Send the first response for five images at one byte per second."""
    names = trial.rng.sample(trial.inputs.good_names, 5)
    run_with_faults(trial, Fault("slow", kinds={"image"}, keys={f"in/{name}" for name in names}, first=1))


def refuse_keys(names: tuple[str, ...], trial: Trial) -> None:
    """Deny access to the first five keys; remove the others after the listing."""
    refused, gone = ({f"in/{name}" for name in some} for some in (names[:5], names[5:]))
    run_with_faults(trial, Fault("access_denied", keys=refused), Fault("no_such_key", keys=gone))


def expire_credentials(trial: Trial) -> None:
    """Expire the credentials at a random image; renew them when the command has ended."""
    assert trial.store is not None
    proxy = trial.store.proxy
    proxy.reset(Fault("expired_token", after_images=trial.rng.randrange(1, len(trial.inputs.names))))

    def meanwhile(command: Command) -> None:
        while not proxy.counts.injected and command.runs_for(0.05):
            pass
        start = time.monotonic()
        ended = not command.runs_for(MAX_CREDENTIALS_S)
        trial.notes.append(f"ended {time.monotonic() - start:.1f} s after the first refusal")
        if not ended and trial.is_ours:
            trial.problems.append(f"did not end within {MAX_CREDENTIALS_S:.0f} s")

    code = trial.run_once(meanwhile)
    if trial.is_ours and code != 1:
        trial.problems.append(f"ended with {code} where the credentials had expired")
    trial.injected = 1
    unlabelled = sum(row.label is None for path, row in trial.read_output().rows if not is_bad(path))
    if unlabelled:
        trial.problems.append(f"{unlabelled} rows without a label, since the credentials had expired")
    proxy.faults = []
    trial.run_until_done()


def list_scenarios(inputs: Inputs) -> list[Scenario]:
    """List the rows of the table, in order."""
    keys = tuple(inputs.good_names[137 :: len(inputs.good_names) // 10][:10])
    statuses = ["access_denied"] * 5 + ["not_found"] * 5
    refused = {name: Row(status, None, None) for name, status in zip(keys, statuses, strict=True)}
    all_pipelines = (OURS, STOCK, STOCK_CHECKPOINT, READ_IMAGES)
    crashed = {POISON: Row("decoder_crash", None, None)}
    return [
        Scenario("none", "disk", Trial.run_until_done, pipelines=all_pipelines),
        Scenario("none, on S3", "s3", Trial.run_until_done, ours=3, stock=3),
        Scenario("none, on a cluster", "cluster", run_on_cluster, ours=3, stock=3),
        Scenario("`kill -9` of the driver", "disk", kill_driver, ours=30),
        Scenario("`kill -9` of a worker every 5 s", "disk", kill_workers, ours=10),
        Scenario("a node's raylet killed", "cluster", kill_raylet, ours=10),
        Scenario("SIGTERM", "disk", terminate, ours=3, pipelines=(OURS,)),
        Scenario("an image kills its decoder", "disk", poison, ours=3, expected=crashed, never_ends=True),
        Scenario("disk full", "disk", fill_disk, ours=3),
        Scenario("503 on 1% of requests", "s3", partial(slow_down, 0.01), ours=3),
        Scenario("503 on 10% of requests", "s3", partial(slow_down, 0.1), ours=3),
        Scenario("503 on 50% of requests", "s3", partial(slow_down, 0.5), ours=3),
        Scenario("200 bodies cut, short or reset", "s3", break_bodies, ours=3),
        Scenario("5 bodies at 1 byte/s", "s3", slow_bodies, ours=3, pipelines=(OURS,)),
        Scenario("5 keys refused, 5 gone", "s3", partial(refuse_keys, keys), ours=3, stock=3, expected=refused),
        Scenario("credentials expire", "s3", expire_credentials, ours=3),
    ]
