"""score() on the session's Ray: every listed file ends as one row, from a folder as from a bucket."""

import json
import os
import signal
import subprocess

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import ray
from conftest import BIN, CLASSES, encode, red_or_blue, solid

from catsdogs.cli import main
from catsdogs.config import ScoreConfig
from catsdogs.data import DecodeForInference
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.schema import FILES, PREDICTIONS
from catsdogs.score import score

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
    newest = max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "_SUCCESS"


def test_a_bucket_gives_the_rows_of_the_folder(zoo, local_scores, red_blue_checkpoint, bucket, put, tmp_path):
    root, contents, _ = zoo
    for name, content in contents.items():
        put(f"in/{name}", content)
    put("in/red/", b"")
    summary = score(config_for(f"s3://{bucket}/in", red_blue_checkpoint, f"s3://{bucket}/out", shard_size=300))
    assert summary["rows"] == summary["listed"] == len(contents)
    copied = tmp_path / "copied"
    copied.mkdir()
    copy_parts(bucket, copied)
    from_bucket = {path.removeprefix(f"s3://{bucket}/in/"): row for path, row in rows_of(copied).items()}
    from_disk = {path.removeprefix(f"{root}/"): row for path, row in rows_of(local_scores[0]).items()}
    assert from_bucket.keys() == from_disk.keys()
    for name, row in from_disk.items():
        other = from_bucket[name]
        assert other["prob"] == pytest.approx(row["prob"], abs=1e-6)
        same = set(row) - {"path", "prob", "probs"}
        assert {column: other[column] for column in same} == {column: row[column] for column in same}


def copy_parts(bucket, folder):
    from catsdogs import storage

    for name in storage.list_names(f"s3://{bucket}/out"):
        if name.startswith("part-"):
            (folder / name).write_bytes(storage.read_bytes(f"s3://{bucket}/out/{name}"))


def test_a_file_that_no_listing_measured_gets_its_size_when_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(red_or_blue("red", 1))
    files = pa.table([[str(tmp_path / "x.bin")], [None], [None]], schema=FILES)
    rows = DecodeForInference(Preprocessing(img_size=32), 10**6)(files)
    assert rows["size_bytes"].to_pylist() == [(tmp_path / "x.bin").stat().st_size]


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_manifests_name_every_entry_once_whatever_its_extension(kind, tmp_path):
    from catsdogs.score.plan import make_plan

    paths = [str(tmp_path / "b.bin"), str(tmp_path / "a,b.jpg"), str(tmp_path / "b.bin")]
    manifest = tmp_path / f"manifest.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"path": paths, "other": [1, 2, 3]}), manifest)
    elif kind == "csv":
        manifest.write_text("other,path\n" + "".join(f'1,"{path}"\n' for path in paths))
    else:
        manifest.write_text("\n".join(paths) + "\n")
    plan = make_plan(config_for(manifest, "unused", tmp_path / "out"), lambda _: None)
    assert pq.read_table(plan.manifest[0])["path"].to_pylist() == sorted(set(paths))


def test_a_manifest_without_its_column_is_an_error_that_says_so(tmp_path):
    from catsdogs.score.plan import make_plan

    (tmp_path / "m.csv").write_text("file\nx.jpg\n")
    with pytest.raises(InputError, match="column named path"):
        make_plan(config_for(tmp_path / "m.csv", "unused", tmp_path / "out"), lambda _: None)


def test_limit_takes_the_first_by_path(zoo, tmp_path):
    from catsdogs.score.plan import make_plan

    plan = make_plan(config_for(zoo[0], "unused", tmp_path / "out", limit=5, shard_size=2), lambda _: None)
    paths = [path for uri in plan.manifest for path in pq.read_table(uri)["path"].to_pylist()]
    assert paths == sorted(f"{zoo[0]}/{name}" for name in zoo[1])[:5]
    assert plan.sizes == [2, 2, 1]


def test_an_output_with_files_is_refused(zoo, red_blue_checkpoint, tmp_path):
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        score(config_for(zoo[0], red_blue_checkpoint, tmp_path))


def test_nothing_to_score_is_an_error(red_blue_checkpoint, tmp_path, ray_cluster):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="no images under"):
        score(config_for(tmp_path / "in", red_blue_checkpoint, tmp_path / "out"))


def test_the_command_ends_3_where_every_row_failed(ray_cluster, red_blue_checkpoint, tmp_path, capsys):
    ray.init(os.environ["RAY_ADDRESS"], ignore_reinit_error=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad\x1b[31m.jpg").write_bytes(b"")
    command = ["score", "--input", tmp_path / "in", "--checkpoint", red_blue_checkpoint, "--output", tmp_path / "out"]
    assert main([str(word) for word in command]) == 3
    assert (tmp_path / "out" / "_SUCCESS").exists()
    shown = capsys.readouterr()
    assert "1 of 1 images have no label" in shown.err
    assert "\x1b" not in shown.out + shown.err


def test_sigterm_ends_143_and_leaves_no_success(ray_cluster, zoo, red_blue_checkpoint, tmp_path):
    command = [
        BIN / "catsdogs",
        "score",
        "--input",
        zoo[0],
        "--checkpoint",
        red_blue_checkpoint,
        "--output",
        tmp_path / "out",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "files to score" in line:
            os.kill(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "terminated: what is done is kept" in errors
    assert not (tmp_path / "out" / "_SUCCESS").exists()
