"""score() on the session's Ray: every listed file becomes one row, from a folder and from a bucket."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BIN, CLASSES, encode, red_or_blue, solid

from benchmarks.faults.proxy import Fault
from catsdogs import storage
from catsdogs.checkpoint import read_checkpoint
from catsdogs.cli import main
from catsdogs.config import ScoreConfig, VerifyConfig
from catsdogs.data import DecodeForInference
from catsdogs.data.runtime import QUIET_LOGGERS
from catsdogs.errors import InputError, RunError
from catsdogs.images import Preprocessing
from catsdogs.schema import FILES, PREDICTIONS, read_table
from catsdogs.score import score, verify
from catsdogs.start import start_ray

ODD_NAMES = ("a b.jpg", "100%.jpg", "%41.jpg", "a+b.jpg", "what?.jpg", "no#1.jpg", "é日本.jpg", "[x]*.JPG")
NUM_IMAGES = 205


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
    """Write intact images, some with odd names, and broken ones; relative path -> expected (status, label)."""
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


def build_config(source, checkpoint, output, **settings):
    defaults = {"precision": "fp32", "max_pixels": 300_000}
    return ScoreConfig(input=str(source), checkpoint=str(checkpoint), output=str(output), **(defaults | settings))


def read_rows(output):
    table = ds.dataset(sorted(output.glob("part-*.parquet"))).to_table()
    return {row["path"]: row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def local_scores(ray_cluster, zoo, red_blue_checkpoint, tmp_path_factory):
    """Score the zoo from the local disk with two actors."""
    output = tmp_path_factory.mktemp("scores") / "out"
    events = []
    summary = score(build_config(zoo[0], red_blue_checkpoint, output, shard_size=60, num_actors=2), events.append)
    return output, summary, events


def test_every_listed_file_becomes_one_row_with_its_status(zoo, local_scores):
    root, _, expected = zoo
    rows = read_rows(local_scores[0])
    found = {path.removeprefix(f"{root}/"): (row["status"], row["label"]) for path, row in rows.items()}
    assert found == expected
    assert sum(pq.read_metadata(part).num_rows for part in local_scores[0].glob("part-*")) == len(expected)


def test_rows_have_the_documented_columns(zoo, local_scores):
    rows = read_rows(local_scores[0])
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
    assert [pq.read_metadata(part).num_rows for part in parts] == [60, 60, 60, 29]
    for part in parts:
        table = pq.read_table(part)
        assert table["path"].to_pylist() == sorted(table["path"].to_pylist())
        assert table.schema.equals(PREDICTIONS)
        metadata = table.schema.metadata
        assert json.loads(metadata[b"catsdogs.class_names"]) == list(CLASSES)
        assert json.loads(metadata[b"catsdogs.preprocessing"])["resize_size"] == 33
        assert metadata[b"catsdogs.model_sha256"].decode() == local_scores[1]["model_sha256"]


def test_the_summary_adds_up_and_success_is_written_last(local_scores):
    output, summary, _ = local_scores
    assert json.loads((output / "_summary.json").read_text()) == summary
    assert summary["listed"] == summary["rows"] == sum(summary["by_status"].values()) == NUM_IMAGES + 4
    assert sum(summary["by_label"].values()) == summary["by_status"]["ok"] == NUM_IMAGES
    assert summary["unlisted"] == {}
    assert (output / "_report.html").read_text().count("data:image/jpeg") == min(NUM_IMAGES, 24)
    names = {path.name for path in output.iterdir() if not path.name.startswith("part-")}
    assert names == {"_SUCCESS", "_manifest", "_report.html", "_run.json", "_stats", "_summary.json"}
    assert max(path.stat().st_mtime_ns for path in output.iterdir()) == (output / "_SUCCESS").stat().st_mtime_ns


def test_a_bucket_gives_the_same_rows_as_a_folder(zoo, local_scores, red_blue_checkpoint, bucket, put):
    root, contents, _ = zoo
    for name, content in contents.items():
        put(f"in/{name}", content)
    put("in/red/", b"")
    summary = score(build_config(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=60))
    assert summary["rows"] == summary["listed"] == len(contents)
    from_bucket = {path.removeprefix(f"s3://{bucket}/in/"): row for path, row in bucket_rows(bucket).items()}
    from_disk = {path.removeprefix(f"{root}/"): row for path, row in read_rows(local_scores[0]).items()}
    assert from_bucket.keys() == from_disk.keys()
    for name, row in from_disk.items():
        other = from_bucket[name]
        assert other["prob"] == pytest.approx(row["prob"], abs=1e-6)
        same = set(row) - {"path", "prob", "probs"}
        assert {column: other[column] for column in same} == {column: row[column] for column in same}


@pytest.fixture(scope="module")
def listed_scores(ray_cluster, zoo, red_blue_checkpoint, tmp_path_factory):
    """Score a list of two images, a broken file and a file with a control character in its name, by the command."""
    start_ray()  # or the command would end the session's Ray when it returns
    folder = tmp_path_factory.mktemp("listed")
    (folder / "bad\x1b[31m.jpg").write_bytes(b"")
    names = ("red/0101.jpg", "blue/0100.jpg", "broken/empty.jpg")
    source = [*(f"{zoo[0]}/{name}" for name in names), f"{folder}/bad\x1b[31m.jpg"]
    (folder / "list.txt").write_text("\n".join(source))
    config = build_config(folder / "list.txt", red_blue_checkpoint, folder / "out", save_embeddings=True)
    command = ["score", "--input", config.input, "--checkpoint", config.checkpoint, "--output", config.output]
    command += ["--precision", "fp32", "--max-pixels", "300000", "--save-embeddings", "--max-error-rate", "0.4"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = main(command)
    return SimpleNamespace(config=config, source=source, output=folder / "out", code=code, shown=shown.getvalue())


def test_embeddings_are_the_inputs_of_the_head(local_scores, red_blue_checkpoint, listed_scores):
    rows, source = read_rows(listed_scores.output), listed_scores.source
    state = read_checkpoint(str(red_blue_checkpoint)).load_state_dict()
    for path in source[:2]:
        row = rows[path]
        with torch.inference_mode():
            probs = (state["fc.weight"] @ torch.tensor(row["embedding"]) + state["fc.bias"]).softmax(dim=0)
        np.testing.assert_allclose(probs, row["probs"], atol=1e-6)
        assert row["label"] == read_rows(local_scores[0])[path]["label"]
    assert [rows[path]["embedding"] for path in source[2:]] == [None, None]
    summary = json.loads((listed_scores.output / "_summary.json").read_text())
    assert summary["device_precisions"] == {"cpu, fp32": 4}
    with pytest.raises(InputError, match="save_embeddings"):
        score(dataclasses.replace(listed_scores.config, save_embeddings=False))


def test_score_exits_3_if_too_many_rows_failed_and_shows_no_control_character(listed_scores):
    assert listed_scores.code == 3
    assert (listed_scores.output / "_SUCCESS").exists()
    assert "2 of 4 images were not classified" in listed_scores.shown
    assert "\x1b" not in listed_scores.shown


def test_a_file_of_unknown_size_gets_its_size_when_it_is_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(red_or_blue("red", 1))
    files = pa.table([[str(tmp_path / "x.bin")], [None], [None]], schema=FILES)
    (rows,) = DecodeForInference(Preprocessing(img_size=32), 10**6, batch_size=8)(files)
    assert rows["size_bytes"].to_pylist() == [(tmp_path / "x.bin").stat().st_size]


def test_three_commands_at_once_finish_on_two_cpus(ray_cluster, zoo, red_blue_checkpoint, tmp_path):
    start_ray()
    configs = [build_config(zoo[0], red_blue_checkpoint, tmp_path / name, limit=40) for name in ("a", "b", "c")]
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    with ThreadPoolExecutor(len(configs)) as executor:
        summaries = list(executor.map(score, configs))
    for name, level in levels.items():  # each command restored what it found
        logging.getLogger(name).setLevel(level)
    assert [summary["rows"] for summary in summaries] == [40, 40, 40]


def start_score(source, checkpoint, output, *more):
    command = [BIN / "catsdogs", "score", "--input", source, "--checkpoint", checkpoint, "--output", output, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_score_exits_143_at_sigterm_without_success(ray_cluster, zoo, red_blue_checkpoint, tmp_path):
    process = start_score(zoo[0], red_blue_checkpoint, tmp_path / "out")
    for line in process.stdout:
        if "files to score" in line:
            os.kill(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "terminated: finished parts are kept; run the same command to resume" in errors
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert not (tmp_path / "out" / "_lease.json").exists()


@pytest.mark.slow  # test_score_crashes kills it at every one of its writes
def test_a_killed_driver_loses_no_row(zoo, local_scores, red_blue_checkpoint, tmp_path):
    """Kill the command three times at a random moment after its first batch; then let it finish."""
    output, rng = tmp_path / "out", random.Random(20261123)
    settings = ("--precision", "fp32", "--max-pixels", "300000", "--shard-size", "60", "--num-actors", "2")
    for _ in range(3):
        process = start_score(zoo[0], red_blue_checkpoint, output, *settings)
        for line in process.stdout:
            if line.startswith("score ") or "rows in" in line:
                break
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
    summary = score(build_config(zoo[0], red_blue_checkpoint, output, shard_size=60, num_actors=2))
    assert summary["rows"] == summary["listed"] == NUM_IMAGES + 4
    assert summary["by_status"] == local_scores[1]["by_status"]
    assert round_probs(read_rows(output)) == round_probs(read_rows(local_scores[0]))
    assert verify(VerifyConfig(output=str(output)))["rows"] == NUM_IMAGES + 4


def round_probs(rows):
    """Round probabilities, whose last digits differ from batch to batch."""
    return {path: row | {"prob": row["prob"] and round(row["prob"], 4), "probs": None} for path, row in rows.items()}


# A store with faults


def fill_bucket(put, num_images):
    for i in range(num_images):
        put(f"in/{CLASSES[i % 2]}/{i:03}.jpg", red_or_blue(CLASSES[i % 2], i))
    return {f"{CLASSES[i % 2]}/{i:03}.jpg": CLASSES[i % 2] for i in range(num_images)}


def test_expired_credentials_and_faults_of_the_store_lose_no_row(
    bucket, put, s3_proxy, red_blue_checkpoint, ray_cluster
):
    expected = fill_bucket(put, 60)
    config = build_config(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=20, batch_size=8)
    s3_proxy.reset(Fault("expired_token", after_images=30))
    with pytest.raises(RunError, match=r"credentials are missing, wrong or expired .*run the same command to resume"):
        score(config)
    s3_proxy.reset()
    assert "_SUCCESS" not in storage.list_names(f"s3://{bucket}/out")
    first_rows = bucket_rows(bucket)
    assert all(row["status"] == "ok" for row in first_rows.values())

    *_, denied, missing = sorted(expected.keys() - {path.removeprefix(f"s3://{bucket}/in/") for path in first_rows})
    s3_proxy.reset(
        Fault("cut", kinds={"image"}, first=1, at_byte=100, total=10),
        Fault("reset", kinds={"image"}, first=1, at_byte=50, total=10),
        Fault("access_denied", keys={f"in/{denied}"}),
        Fault("no_such_key", keys={f"in/{missing}"}),
        Fault("short", kinds={"image"}, first=1, at_byte=60, total=10),
        Fault("slow_down", probability=0.1),
    )
    summary = score(config)
    assert summary["by_status"] == {"access_denied": 1, "not_found": 1, "ok": 58}
    assert summary["retries"] >= 20
    labels = {path.removeprefix(f"s3://{bucket}/in/"): row["label"] for path, row in bucket_rows(bucket).items()}
    assert labels == expected | {denied: None, missing: None}

    s3_proxy.reset()
    summary = score(dataclasses.replace(config, retry_failed=True))
    assert (summary["scored"], summary["by_status"]) == (2, {"ok": 60})
    assert s3_proxy.counts.by_kind["image"] == 2 + 24  # scored again, and shown in the report


def bucket_rows(bucket):
    names = [name for name in storage.list_names(f"s3://{bucket}/out") if name.startswith("part-")]
    tables = [read_table(storage.read_bytes(f"s3://{bucket}/out/{name}")) for name in names]
    return {row["path"]: row for table in tables for row in table.to_pylist()}
