"""Jobs that `ray job submit` sends to a Ray head with token authentication."""

import shlex
import subprocess
import urllib.error
import urllib.request

import pyarrow.dataset as ds
import pytest
from conftest import BIN, ROOT


def test_a_job_refuses_relative_paths_then_trains_and_scores(ray_cluster, red_blue_root, tmp_path):
    relative = ["python", "-m", "jobs.train", "--data-dir", "data", "--weights", "none"]
    train = ["python", "-m", "jobs.train", "--data-dir", red_blue_root, "--storage-path", tmp_path, "--name", "job"]
    train += ["--weights", "none", "--img-size", 32, "--epochs", 1, "--batch-size", 8, "--freeze", "backbone"]
    score = ["python", "-m", "jobs.score", "--input", red_blue_root / "validation", "--output", tmp_path / "scores"]
    score += ["--checkpoint", tmp_path / "job" / "best"]
    script = "test ! -e .git && ! {} && {} && {}".format(
        *(shlex.join(map(str, command)) for command in (relative, train, score))
    )
    submit = [BIN / "ray", "job", "submit", "--address", ray_cluster, "--working-dir", ".", "--", "bash", "-c", script]
    done = subprocess.run(submit, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--data-dir data: expected an absolute path" in done.stdout + done.stderr
    assert "epoch 1/1" in done.stdout
    rows = ds.dataset(sorted((tmp_path / "scores").glob("part-*"))).to_table().to_pylist()
    assert len(rows) == 14
    assert {row["status"] for row in rows} == {"ok"}
    assert (tmp_path / "scores" / "_SUCCESS").exists()


def test_a_client_without_the_token_gets_401(ray_cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{ray_cluster}/api/jobs/", timeout=30)
