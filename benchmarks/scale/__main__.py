"""Measure how `score`, `audit` and `compare` grow, and assert its goals.

python -m benchmarks.scale --only planning
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.scale.audited_set import check_audited_set
from benchmarks.scale.auditing import check_audit
from benchmarks.scale.commits import check_commits
from benchmarks.scale.comparing import check_comparison
from benchmarks.scale.listing import check_listing
from benchmarks.scale.memory import check_memory
from benchmarks.scale.null_pipeline import check_null_pipeline
from benchmarks.scale.planning import check_planning
from benchmarks.speed.checks import Checks

# Each yields lines, and whether the goal of each was reached.
CHECKS: dict[str, Callable[[Path], Iterator[tuple[str, bool]]]] = {
    "listing": check_listing,
    "planning": check_planning,
    "commits": check_commits,
    "audit": check_audit,
    "memory": check_memory,
    "comparison": check_comparison,
    "audited-set": check_audited_set,
    "pipeline": check_null_pipeline,
}
IN_MEMORY = Path("/dev/shm")  # a disk would make the driver wait for it


def main() -> int:
    """Run the checks; 1 where a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CHECKS, help="run this check only")
    only = parser.parse_args().only
    checks = Checks()
    for name, check in CHECKS.items():
        if only in (None, name):
            _run(checks, check)
    return 1 if checks.missed else 0


def _run(checks: Checks, check: Callable[[Path], Iterator[tuple[str, bool]]]) -> None:
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="catsdogs-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        for line, reached in check(Path(folder)):
            checks.add(line, reached)
            print(f"{checks.lines[-1]} [{time.monotonic() - start_s:.0f} s]", flush=True)


if __name__ == "__main__":
    sys.exit(main())
