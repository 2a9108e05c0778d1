"""Parts committed a second on an S3 server that answers each request 50 ms late."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scale.generated import FOLDER, RUN_SETTINGS, NullClassifier, iter_entries
from benchmarks.scale.store import LateStore
from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.lease import Lease
from catsdogs.progress import silent
from catsdogs.schema import parquet_bytes
from catsdogs.score.attempts import score_pending_shards
from catsdogs.score.background import BackgroundListing
from catsdogs.score.parts import PartWriter
from catsdogs.score.plan import RUN, Plan, build_files_table
from catsdogs.score.run_files import RunStats
from catsdogs.score.threads import map_in_threads

NUM_SHARDS, SHARD_SIZE = 1_500, 20
DELAY_S = 0.05
MIN_RATE = 100


def check_commits(_: Path) -> Iterator[tuple[str, bool]]:
    """Commit generated rows to the server, in a separate process."""
    with LateStore(DELAY_S) as store:
        command = [sys.executable, "-m", "benchmarks.scale.commits", "s3://scale/out", str(NUM_SHARDS)]
        environment = os.environ | store.environment
        seconds = float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    rate = NUM_SHARDS / seconds
    yield (
        f"Parts committed on an S3 server with {DELAY_S * 1000:.0f} ms added to each request: {rate:.0f}/s "
        f"(goal: at least {MIN_RATE}).",
        rate >= MIN_RATE,
    )


def _commit(output: str, num_shards: int) -> float:
    """Commit all parts of a plan; return the seconds from the first row to the last commit."""
    plan = Plan(output, [SHARD_SIZE] * num_shards, [0], listing_cursor=None)
    plan.save()
    storage.write_bytes(storage.join(output, RUN), json.dumps(dict(RUN_SETTINGS.settings)).encode())
    for _ in map_in_threads(lambda shard: _write_manifest(plan, shard), range(num_shards)):
        pass
    classifier = NullClassifier(num_shards * SHARD_SIZE, SHARD_SIZE)
    config = ScoreConfig(input=FOLDER, checkpoint="none", output=output)
    with (
        Lease(output, silent, "scoring run", "--output") as lease,
        BackgroundListing(plan, config, lease, silent) as listing,  # finds the plan complete
        PartWriter(output, {}, lease) as writer,
    ):
        pending = listing.wait_for_shards(writer)
        start_s = time.monotonic()
        score_pending_shards(pending, listing, classifier, writer, RunStats(), silent)
        return time.monotonic() - start_s


def _write_manifest(plan: Plan, shard: int) -> None:
    files = build_files_table(iter_entries(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE), shard)
    storage.write_bytes(plan.manifest_uri(shard), parquet_bytes(files))


if __name__ == "__main__":
    print(_commit(sys.argv[1], int(sys.argv[2])))
