"""The dataset of `score` on pretended GPUs: how many rows a call of an actor gets. No clock is read."""

import json
import subprocess
import sys
from collections import Counter

import pytest

MEASURE = """
import json, sys
from pathlib import Path
from benchmarks.scale.null_pipeline import measure
from catsdogs import local_ray

with local_ray.without_cluster_processes():
    print(json.dumps(measure(gpus=2, shards=8, jpeg_bytes=0, work=Path(sys.argv[1])).rows_per_call))
"""


@pytest.fixture(scope="module")
def rows_per_call(tmp_path_factory):
    words = [sys.executable, "-c", MEASURE, tmp_path_factory.mktemp("null")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_call_gets_a_large_block_and_the_last_of_a_shard_the_rest(rows_per_call):
    assert Counter(rows_per_call) == {3584: 2 * 8, 10_000 - 2 * 3584: 8}
