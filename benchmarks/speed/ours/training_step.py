"""Our training step alone, bf16, on one batch again and again, in memory."""

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.profiles import BATCH_SIZE, build_cpu_step
from benchmarks.speed.protocol import parse_arguments

NUM_STEPS = 8


def main() -> None:
    """Take `NUM_STEPS` steps."""
    step = build_cpu_step(parse_arguments().checkpoint)
    for _ in range(NUM_STEPS):
        step()
        report_batch(BATCH_SIZE)


if __name__ == "__main__":
    main()
