"""Keys listed a second from an S3 server that answers each page 50 ms late: one page after another, and in ranges."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scale.generated import FOLDER, path_of
from benchmarks.scale.store import LateStore
from catsdogs import storage
from catsdogs.storage.s3 import split_s3
from catsdogs.storage.s3_listing import list_objects

NUM_KEYS = 200_000
DELAY_S = 0.05
MIN_RATIO = 2.0


def check_listing(_: Path) -> Iterator[tuple[str, bool]]:
    """List the same prefix in both ways, in a separate process."""
    with LateStore(DELAY_S, NUM_KEYS) as store:
        command = [sys.executable, "-m", "benchmarks.scale.listing", str(NUM_KEYS)]
        found = subprocess.run(command, env=os.environ | store.environment, stdout=subprocess.PIPE, check=True).stdout
    one_s, ranges_s, cpu_s = json.loads(found)
    yield (
        f"Keys listed on an S3 server with {DELAY_S * 1000:.0f} ms added to each page: {NUM_KEYS / ranges_s:,.0f}/s in "
        f"ranges, {NUM_KEYS / one_s:,.0f}/s one page after another: {one_s / ranges_s:.1f} times as many "
        f"(goal: at least {MIN_RATIO}); CPU time of a key {1e6 * cpu_s / NUM_KEYS:.0f} us.",
        one_s / ranges_s >= MIN_RATIO,
    )


def _list(num_keys: int) -> tuple[float, float, float]:
    """Return the seconds of both ways, and the CPU seconds of the second one."""
    start_s = time.monotonic()
    keys = [item["Key"] for item in list_objects(FOLDER, *split_s3(f"{FOLDER}/"))]
    one_s = time.monotonic() - start_s
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    paths = [entry.path for entry in storage.Listing(FOLDER, collect_folders=False)]
    ranges_s, cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
    assert [f"s3://{split_s3(FOLDER)[0]}/{key}" for key in keys] == paths == [path_of(i) for i in range(num_keys)]
    return one_s, ranges_s, cpu_s


if __name__ == "__main__":
    print(json.dumps(_list(int(sys.argv[1]))))
