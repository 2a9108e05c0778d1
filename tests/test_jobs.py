"""Jobs that `ray job submit` sends to a Ray head with token authentication."""

import json
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import ray
from conftest import BIN, ROOT
from kubernetes_documents import read_entrypoint

from catsdogs.start import start_ray


def submit(dashboard: str, entrypoint: str) -> subprocess.Popen[str]:
    """Start to submit a job by shell, as KubeRay does."""
    command = f"{BIN / 'ray'} job submit --address {dashboard} --working-dir . -- {entrypoint} ;"
    shell = ["bash", "-c", command]
    return subprocess.Popen(shell, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait(submitted: subprocess.Popen[str]) -> str:
    """Wait until a job has succeeded; return what it printed."""
    printed, _ = submitted.communicate(timeout=300)
    assert submitted.returncode == 0, printed
    return printed


def get_json(url: str) -> Any:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def scrape(until: str) -> list[tuple[str, dict[str, str], float]]:
    """Scrape the only node, as Prometheus does, until it exports a name; return names, labels and values of ours."""
    start_ray()
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(60):  # a driver reports each 10 s, and when it ends
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        if until in text:
            break
        time.sleep(0.5)
    lines = re.findall(r"^ray_catsdogs_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="(.*?)"', labels)), float(value)) for name, labels, value in lines]


def test_the_jobs_for_kubernetes_run_as_written_with_local_paths(
    ray_cluster, red_blue_root, red_blue_checkpoint, tmp_path
):
    small = "--use-gpu false --weights none --img-size 32 --epochs 1 --batch-size 8 --freeze backbone"
    local = {"s3://EXAMPLE-INPUT/images": red_blue_root, "s3://EXAMPLE-OUTPUT/catsdogs/runs": tmp_path}
    train = read_entrypoint("rayjob-train", local | {"--num-workers 2 --use-gpu true": small})
    local = {"s3://EXAMPLE-OUTPUT/catsdogs/runs/first/best": red_blue_checkpoint}
    local |= {"s3://EXAMPLE-OUTPUT/catsdogs/scores": tmp_path / "scores"}
    local |= {"s3://EXAMPLE-INPUT/images": red_blue_root / "validation"}
    score = read_entrypoint("rayjob-score", local | {"--num-actors 4 --use-gpu true": "--use-gpu false"})
    relative = "python -m jobs.train --data-dir data --weights none"

    training = submit(ray_cluster, train)
    scoring = submit(ray_cluster, shlex.join(["bash", "-c", f"test ! -e .git && ! {relative} && {score}"]))
    assert "--data-dir data: expected an absolute path" in wait(scoring)
    assert "epoch 1/1" in wait(training)
    assert (tmp_path / "first" / "best" / "model.safetensors").exists()
    rows = ds.dataset(sorted((tmp_path / "scores").glob("part-*"))).to_table().to_pylist()
    assert len(rows) == 14
    assert {row["status"] for row in rows} == {"ok"}
    assert (tmp_path / "scores" / "_SUCCESS").exists()

    metrics = scrape(until=f"{tmp_path}/scores")
    assert [
        (labels["status"], value)
        for name, labels, value in metrics
        if (name, labels.get("output")) == ("score_rows_total", f"{tmp_path}/scores")
    ] == [("ok", 14)]
    epoch = {name: value for name, labels, value in metrics if labels.get("run") == "first"}
    assert epoch["train_epoch"] == 1
    assert {f"train_{name}" for name in ("loss", "accuracy", "val_loss", "images_per_s")} <= epoch.keys()
    ids = [job["job_id"] for job in get_json(f"{ray_cluster}/api/jobs/")]
    found = [get_json(f"{ray_cluster}/api/data/datasets/{job_id}")["datasets"] for job_id in ids]
    assert "score" in {dataset["dataset"].split("_")[0] for datasets in found for dataset in datasets}


def test_a_client_without_the_token_gets_401(ray_cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{ray_cluster}/api/jobs/", timeout=30)
