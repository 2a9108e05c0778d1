"""score() on the session's Ray: every listed file ends as one row, from a folder as from a bucket."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BIN, CLASSES, encode, red_or_blue, solid

from benchmarks.faults.proxy import Fault
from catsdogs import storage
from catsdogs.checkpoint import load
from catsdogs.cli import main
from catsdogs.config import ScoreConfig, VerifyConfig
from catsdogs.data import DecodeForInference
from catsdogs.errors import InputError, RunError
from catsdogs.images import Preprocessing
from catsdogs.schema import FILES, PREDICTIONS, read_table
from catsdogs.score import score, verify
from catsdogs.start import start_ray

ODD_NAMES = ("a b.jpg", "100%.jpg", "%41.jpg", "a+b.jpg", "what?.jpg", "no#1.jpg", "é日本.jpg", "[x]*.JPG")
NUM_IMAGES = 1005  # more than a page of S3's listing


def broken_files():
    whole = encode(solid((200, 10, 10)))
    return {
        "empty.jpg": (b"", "empty"),
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "page.png": (b"<!doctype html>", "unsupported"),
        "huge.png": (encode(solid((1, 2, 3), (700, 700)), "PNG"), "too_large"),
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Write 1,005 good pictures, some with odd names, and broken ones; relative path -> expected (status, label)."""
    root = tmp_path_factory.mktemp("zoo")
    contents, expected = {}, {}
    for i in range(NUM_IMAGES):
        label = CLASSES[i % 2]
        name = ODD_NAMES[i] if i < len(ODD_NAMES) else f"{i:04}.jpg"
        contents[f"{label}/{name}"] = red_or_blue(label, i % 60)
        expected[f"{label}/{name}"] = ("ok", label)
    for name, (content, status) in broken_files().items():
        contents[f"broken/{name}"] = content
        expected[f"broken/{name}"] = (status, None)
    for name, content in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / ".hidden.jpg").write_bytes(b"not listed")
    return root, contents, expected


def config_for(source, checkpoint, output, **settings):
    defaults = {"precision": "fp32", "max_pixels": 300_000}
    return ScoreConfig(input=str(source), checkpoint=str(checkpoint), output=str(output), **(defaults | settings))


def rows_of(output):
    table = ds.dataset(sorted(output.glob("part-*.parquet"))).to_table()
    return {row["path"]: row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def local_scores(ray_cluster, zoo, red_blue_checkpoint, tmp_path_factory):
    """Score the zoo from the local disk, with two models on two cores."""
    output = tmp_path_factory.mktemp("scores") / "out"
    events = []
    summary = score(config_for(zoo[0], red_blue_checkpoint, output, shard_size=300, num_actors=2), events.append)
    return output, summary, events


def test_every_listed_file_is_one_row_with_its_status(zoo, local_scores):
    root, _, expected = zoo
    rows = rows_of(local_scores[0])
    found = {path.removeprefix(f"{root}/"): (row["status"], row["label"]) for path, row in rows.items()}
    assert found == expected
    assert sum(pq.read_metadata(part).num_rows for part in local_scores[0].glob("part-*")) == len(expected)


def test_rows_carry_the_columns_of_the_contract(zoo, local_scores):
    rows = rows_of(local_scores[0])
    good = rows[f"{zoo[0]}/red/0101.jpg"]
    assert good["true_label"] == "red"
    assert good["index"] == 1
    assert good["prob"] == max(good["probs"])
    assert sum(good["probs"]) == pytest.approx(1)
    assert (good["width"], good["height"]) == (40, 36)
    assert good["size_bytes"] == len(zoo[1]["red/0101.jpg"])
    assert good["error"] is None
    failed = rows[f"{zoo[0]}/broken/huge.png"]
    assert failed["true_label"] is None
    assert failed["prob"] is None
    assert failed["probs"] is None
    assert (failed["width"], failed["height"]) == (700, 700)
    assert "490,000" in failed["error"] or "490000" in failed["error"] or "700" in failed["error"]


def test_parts_are_sorted_shards_with_the_model_in_their_metadata(local_scores):
    parts = sorted(local_scores[0].glob("part-*.parquet"))
    assert [path.name for path in parts] == [f"part-{i:05}.parquet" for i in range(4)]
    assert [pq.read_metadata(part).num_rows for part in parts] == [300, 300, 300, 109]
    for part in parts:
        table = pq.read_table(part)
        assert table["path"].to_pylist() == sorted(table["path"].to_pylist())
        assert table.schema.equals(PREDICTIONS)
        metadata = table.schema.metadata
        assert json.loads(metadata[b"catsdogs.class_names"]) == list(CLASSES)
        assert json.loads(metadata[b"catsdogs.preprocessing"])["resize_size"] == 33
        assert metadata[b"catsdogs.model_sha256"].decode() == local_scores[1]["model_sha256"]


def test_the_summary_adds_up_and_success_stands_last(local_scores):
    output, summary, _ = local_scores
    assert json.loads((output / "_summary.json").read_text()) == summary
    assert summary["listed"] == summary["rows"] == sum(summary["by_status"].values()) == NUM_IMAGES + 4
    assert sum(summary["by_label"].values()) == summary["by_status"]["ok"] == NUM_IMAGES
    assert summary["unlisted"] == {}
    names = {path.name for path in output.iterdir() if not path.name.startswith("part-")}
    assert names == {"_SUCCESS", "_manifest", "_report.html", "_run.json", "_stats", "_summary.json"}
    assert max(path.stat().st_mtime_ns for path in output.iterdir()) == (output / "_SUCCESS").stat().st_mtime_ns


def test_a_bucket_gives_the_rows_of_the_folder(zoo, local_scores, red_blue_checkpoint, bucket, put):
    root, contents, _ = zoo
    for name, content in contents.items():
        put(f"in/{name}", content)
    put("in/red/", b"")
    summary = score(config_for(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=300))
    assert summary["rows"] == summary["listed"] == len(contents)
    from_bucket = {path.removeprefix(f"s3://{bucket}/in/"): row for path, row in bucket_rows(bucket).items()}
    from_disk = {path.removeprefix(f"{root}/"): row for path, row in rows_of(local_scores[0]).items()}
    assert from_bucket.keys() == from_disk.keys()
    for name, row in from_disk.items():
        other = from_bucket[name]
        assert other["prob"] == pytest.approx(row["prob"], abs=1e-6)
        same = set(row) - {"path", "prob", "probs"}
        assert {column: other[column] for column in same} == {column: row[column] for column in same}


def test_embeddings_are_what_the_head_makes_the_probabilities_of(zoo, local_scores, red_blue_checkpoint, tmp_path):
    source = [f"{zoo[0]}/{name}" for name in ("red/0101.jpg", "blue/0100.jpg", "broken/empty.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(source))
    config = config_for(tmp_path / "list.txt", red_blue_checkpoint, tmp_path / "out", save_embeddings=True)
    summary = score(config)
    rows = rows_of(tmp_path / "out")
    head = load(str(red_blue_checkpoint)).model.fc
    for path in source[:2]:
        row = rows[path]
        with torch.inference_mode():
            probs = head(torch.tensor(row["embedding"])[None]).softmax(dim=1)[0]
        np.testing.assert_allclose(probs, row["probs"], atol=1e-6)
        assert row["label"] == rows_of(local_scores[0])[path]["label"]
    assert rows[source[2]]["embedding"] is None
    assert summary["device_precisions"] == {"cpu, fp32": 3}
    with pytest.raises(InputError, match="save_embeddings"):
        score(dataclasses.replace(config, save_embeddings=False))


def test_a_file_that_no_listing_measured_gets_its_size_when_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(red_or_blue("red", 1))
    files = pa.table([[str(tmp_path / "x.bin")], [None], [None]], schema=FILES)
    (rows,) = DecodeForInference(Preprocessing(img_size=32), 10**6, batch_size=8)(files)
    assert rows["size_bytes"].to_pylist() == [(tmp_path / "x.bin").stat().st_size]


def test_the_command_ends_3_where_every_row_failed(ray_cluster, red_blue_checkpoint, tmp_path, capsys):
    start_ray()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad\x1b[31m.jpg").write_bytes(b"")
    command = ["score", "--input", tmp_path / "in", "--checkpoint", red_blue_checkpoint, "--output", tmp_path / "out"]
    assert main([str(word) for word in command]) == 3
    assert (tmp_path / "out" / "_SUCCESS").exists()
    shown = capsys.readouterr()
    assert "1 of 1 images have no label" in shown.err
    assert "\x1b" not in shown.out + shown.err


def start_scoring(source, checkpoint, output, *more):
    command = [BIN / "catsdogs", "score", "--input", source, "--checkpoint", checkpoint, "--output", output, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_ends_143_and_leaves_no_success(ray_cluster, zoo, red_blue_checkpoint, tmp_path):
    process = start_scoring(zoo[0], red_blue_checkpoint, tmp_path / "out")
    for line in process.stdout:
        if "files to score" in line:
            os.kill(process.pid, signal.SIGTERM)
            break
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert time.monotonic() - began < 30
    assert "terminated: what is done is kept" in errors
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert not (tmp_path / "out" / "_lease.json").exists()


@pytest.mark.slow  # test_score_crashes kills it at every one of its writes
def test_a_killed_driver_loses_nothing(zoo, local_scores, red_blue_checkpoint, tmp_path):
    """Kill the command three times at random, each time once it labels; then let it finish."""
    output, rng = tmp_path / "out", random.Random(20261123)
    settings = ("--precision", "fp32", "--max-pixels", "300000", "--shard-size", "300", "--num-actors", "2")
    for _ in range(3):
        process = start_scoring(zoo[0], red_blue_checkpoint, output, *settings)
        for line in process.stdout:
            if line.startswith("score ") or "rows in" in line:
                break
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
    summary = score(config_for(zoo[0], red_blue_checkpoint, output, shard_size=300, num_actors=2))
    assert summary["rows"] == summary["listed"] == NUM_IMAGES + 4
    assert summary["by_status"] == local_scores[1]["by_status"]
    assert without_probs(rows_of(output)) == without_probs(rows_of(local_scores[0]))
    assert verify(VerifyConfig(output=str(output)))["rows"] == NUM_IMAGES + 4


def without_probs(rows):
    """Round what another batch computes otherwise in the last digit."""
    return {path: row | {"prob": row["prob"] and round(row["prob"], 4), "probs": None} for path, row in rows.items()}


# Through a store on a bad day


def fill_bucket(put, num_images):
    for i in range(num_images):
        put(f"in/{CLASSES[i % 2]}/{i:03}.jpg", red_or_blue(CLASSES[i % 2], i))
    return {f"{CLASSES[i % 2]}/{i:03}.jpg": CLASSES[i % 2] for i in range(num_images)}


def test_a_store_on_a_bad_day_costs_time_and_no_row(bucket, put, s3_proxy, red_blue_checkpoint, ray_cluster):
    expected = fill_bucket(put, 60)
    s3_proxy.reset(
        Fault("cut", kinds={"image"}, first=1, at_byte=100, total=10),
        Fault("reset", kinds={"image"}, first=1, at_byte=50, total=10),
        Fault("access_denied", keys={"in/red/001.jpg"}),
        Fault("no_such_key", keys={"in/blue/002.jpg"}),
        Fault("short", kinds={"image"}, first=1, at_byte=60, total=10),
        Fault("slow_down", probability=0.1),
    )
    summary = score(config_for(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=20))
    assert summary["by_status"] == {"access_denied": 1, "not_found": 1, "ok": 58}
    assert summary["retries"] >= 20
    rows = bucket_rows(bucket)
    labels = {path.removeprefix(f"s3://{bucket}/in/"): row["label"] for path, row in rows.items()}
    assert labels == expected | {"red/001.jpg": None, "blue/002.jpg": None}
    s3_proxy.reset()
    summary = score(
        config_for(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=20, retry_failed=True)
    )
    assert (summary["scored"], summary["by_status"]) == (2, {"ok": 60})
    assert s3_proxy.counts.by_kind["image"] == 2


def test_expired_credentials_stop_the_job_and_leave_no_row_of_theirs(
    bucket, put, s3_proxy, red_blue_checkpoint, ray_cluster
):
    fill_bucket(put, 60)
    config = config_for(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=20, batch_size=8)
    s3_proxy.reset(Fault("expired_token", after_images=30))
    with pytest.raises(RunError, match=r"credentials are missing, wrong or expired .*the same command goes on"):
        score(config)
    s3_proxy.reset()
    assert "_SUCCESS" not in storage.list_names(f"s3://{bucket}/out")
    assert all(row["status"] == "ok" for row in bucket_rows(bucket).values())
    assert score(config)["by_status"] == {"ok": 60}


def bucket_rows(bucket):
    names = [name for name in storage.list_names(f"s3://{bucket}/out") if name.startswith("part-")]
    tables = [read_table(storage.read_bytes(f"s3://{bucket}/out/{name}")) for name in names]
    return {row["path"]: row for table in tables for row in table.to_pylist()}
