"""Jobs under `ray job submit` against a real head with token authentication, and what they refuse."""

import os
import subprocess
import urllib.error
import urllib.request

import pyarrow.dataset as ds
import pytest
from conftest import BIN, ROOT


@pytest.fixture
def submit(ray_cluster):
    """Submit a job from this folder and wait for it."""

    def run(*entrypoint: object, **environment: str) -> subprocess.CompletedProcess:
        command = [
            BIN / "ray",
            "job",
            "submit",
            "--address",
            ray_cluster,
            "--working-dir",
            ".",
            "--",
            *map(str, entrypoint),
        ]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_train_and_score_run_as_jobs(submit, red_blue_root, tmp_path):
    train = ["python", "-m", "jobs.train", "--data-dir", red_blue_root, "--storage-path", tmp_path, "--name", "job"]
    train += ["--weights", "none", "--img-size", 32, "--epochs", 1, "--batch-size", 8, "--freeze", "backbone"]
    score = ["python", "-m", "jobs.score", "--input", red_blue_root / "validation", "--output", tmp_path / "scores"]
    score += ["--checkpoint", tmp_path / "job" / "best"]
    trained = submit(*train)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "epoch 1/1" in trained.stdout
    scored = submit(*score)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    rows = ds.dataset(sorted((tmp_path / "scores").glob("part-*"))).to_table().to_pylist()
    assert len(rows) == 14
    assert {row["status"] for row in rows} == {"ok"}
    assert (tmp_path / "scores" / "_SUCCESS").exists()


def test_a_job_refuses_relative_paths(submit):
    result = submit("python", "-m", "jobs.train", "--data-dir", "data", "--weights", "none")
    assert result.returncode != 0
    assert "--data-dir data: expected an absolute path" in result.stdout + result.stderr


def test_without_its_token_a_client_gets_401(ray_cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{ray_cluster}/api/jobs/", timeout=30)
