"""Jobs that `ray job submit` sends to a Ray head with token authentication."""

import shlex
import subprocess
import urllib.error
import urllib.request

import pyarrow.dataset as ds
import pytest
from conftest import BIN, ROOT
from kubernetes_documents import read_entrypoint


def submit(dashboard: str, entrypoint: str) -> str:
    """Submit a job by shell, as KubeRay does; return what was printed once it has succeeded."""
    command = f"{BIN / 'ray'} job submit --address {dashboard} --working-dir . -- {entrypoint} ;"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, executable="/bin/bash"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_jobs_for_kubernetes_run_as_written_with_local_paths(ray_cluster, red_blue_root, tmp_path):
    small = "--use-gpu false --weights none --img-size 32 --epochs 1 --batch-size 8 --freeze backbone"
    where = {"s3://EXAMPLE-OUTPUT/catsdogs": tmp_path, "--num-workers 2 --use-gpu true": small}
    train = read_entrypoint("rayjob-train", where | {"s3://EXAMPLE-INPUT/images": red_blue_root})
    where = {"s3://EXAMPLE-OUTPUT/catsdogs": tmp_path, "--num-actors 4 --use-gpu true": "--use-gpu false"}
    score = read_entrypoint("rayjob-score", where | {"s3://EXAMPLE-INPUT/images": red_blue_root / "validation"})
    relative = "python -m jobs.train --data-dir data --weights none"

    assert "epoch 1/1" in submit(ray_cluster, train)
    # In a second cluster, where the run exists.
    printed = submit(ray_cluster, shlex.join(["bash", "-c", f"test ! -e .git && ! {relative} && {train} && {score}"]))
    assert "--data-dir data: expected an absolute path" in printed
    assert f"{tmp_path}/runs/first exists: expected a new --name" in printed
    rows = ds.dataset(sorted((tmp_path / "scores").glob("part-*"))).to_table().to_pylist()
    assert len(rows) == 14
    assert {row["status"] for row in rows} == {"ok"}
    assert (tmp_path / "scores" / "_SUCCESS").exists()


def test_a_client_without_the_token_gets_401(ray_cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{ray_cluster}/api/jobs/", timeout=30)
