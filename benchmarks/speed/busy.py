"""Time training steps on a machine that runs another process: one worker of two threads, and two workers of one.

python -m benchmarks.speed.busy

Linux gives each session (`setsid`) the same share of a core that several want: a busy process of another session takes
as much as all threads of a step.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.speed.batch_report import REPORT_FILE, read_report, report_batch
from benchmarks.speed.page import format_table
from benchmarks.speed.profiles import BATCH_SIZE, CPU, build_training_step
from catsdogs.images import Preprocessing
from catsdogs.process_setup import configure_threads_and_malloc
from catsdogs.resnet import build_resnet50
from catsdogs.train.process_group import init_process_group
from catsdogs.train.worker import Ranks

ONE_WORKER, TWO_WORKERS = MODES = ("one worker of two threads", "two workers of one thread")
BUSY_LOOP = (sys.executable, "-c", "while True: pass")
WINDOWS_S = {"alone": 12.0, "busy, another session": 30.0, "busy, the same session": 15.0}
NUM_WARM_UP = 3  # steps


def main() -> None:
    """Print a table of images per second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.busy", description=__doc__.splitlines()[0])
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--run", nargs=3, metavar=("MODE", "RANK", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_steps(build_step(options.img_size, *options.run))
    else:
        print(format_table(("images/s", *WINDOWS_S), (measure(mode, options.img_size) for mode in MODES)))


def build_step(img_size: int, mode: str, rank: str, store: str) -> Callable[[], object]:
    """Build a training step of one process."""
    num_processes = 2 if mode == TWO_WORKERS else 1
    configure_threads_and_malloc(num_processes)
    model = build_resnet50(num_classes=2, seed=0).to(memory_format=torch.channels_last)
    forward: Callable[[torch.Tensor], torch.Tensor] = model
    if mode == TWO_WORKERS:
        init_process_group(int(rank), store, num_processes, "gloo", timeout_s=600)
        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    ranks, batch_size = Ranks(int(rank), num_processes), BATCH_SIZE // num_processes
    return build_training_step(model, forward, Preprocessing(img_size=img_size), CPU, batch_size, ranks)


def run_steps(step: Callable[[], object]) -> None:
    """Take steps until the process is ended; the first one reports them."""
    while True:
        step()
        if not dist.is_initialized() or dist.get_rank() == 0:
            report_batch(BATCH_SIZE)


def measure(mode: str, img_size: int) -> list[str]:
    """Measure the rates of one mode, a row of the table."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        report = Path(folder, "batches.txt")
        report.touch()
        command = [sys.executable, "-m", "benchmarks.speed.busy", "--img-size", str(img_size), "--run", mode]
        for rank in range(2 if mode == TWO_WORKERS else 1):
            started = start([*command, str(rank), f"{folder}/store"], report)
            processes.enter_context(started)
        while len(read_report(report)) < NUM_WARM_UP:
            time.sleep(0.1)
        return [mode, *(f"{measure_rate(report, window):.1f}" for window in WINDOWS_S)]


def measure_rate(report: Path, window: str) -> float:
    """Measure images per second in a window, from the end of its first step to that of its last."""
    with ExitStack() as processes:
        if window != "alone":
            processes.enter_context(start(BUSY_LOOP, report, is_new_session="another" in window))
        first = len(read_report(report))
        time.sleep(WINDOWS_S[window])
        steps = read_report(report)[first:]
    if len(steps) < 2:
        return 0.0
    return (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0])


@contextmanager
def start(command: list[str] | tuple[str, ...], report: Path, is_new_session: bool = False) -> Iterator[None]:
    """Run a process until the block ends."""
    environment = os.environ | {REPORT_FILE: str(report)}
    with subprocess.Popen(command, env=environment, start_new_session=is_new_session) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    main()
