"""`audit` of drawn pictures with planted issues, on the session's Ray, on a local disk and on S3."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from spots import draw_spots, encode_jpeg, spots_jpeg

from catsdogs import labels, storage
from catsdogs.auditing import audit, outputs, pairs
from catsdogs.cli import main
from catsdogs.config import AuditConfig
from catsdogs.errors import RunError
from catsdogs.labels import LabelSource
from catsdogs.schema import read_table
from catsdogs.start import start_ray

pytestmark = pytest.mark.usefixtures("ray_cluster")
Write = Callable[[str, bytes], object]


def build_planted() -> dict[str, bytes]:
    """Build files by path: 12 pictures of each class, and issues of each kind."""
    seeds = {f"{name}/{i}.jpg": 100 * n + i for n, (name, count) in enumerate(SETS.items()) for i in range(count)}
    files = {path: spots_jpeg(seed) for path, seed in seeds.items()}
    smaller = Image.fromarray(draw_spots(120, 160, 1)).resize((128, 96))
    blurred = Image.fromarray(draw_spots(120, 160, 901)).filter(ImageFilter.GaussianBlur(12))
    png = io.BytesIO()
    Image.fromarray(draw_spots(90, 90, 902)).save(png, "PNG")
    return files | {
        "train/cats/copy-1.jpg": files["train/cats/0.jpg"],
        "validation/cats/copy-2.jpg": files["train/cats/0.jpg"],
        "validation/cats/smaller.jpg": encode_jpeg(smaller, 60),
        "train/dogs/conflict.jpg": files["train/cats/2.jpg"],
        "train/dogs/copy.jpg": files["train/dogs/3.jpg"],
        "train/cats/truncated.jpg": files["train/cats/4.jpg"][:-400],
        "train/cats/empty.jpg": b"",
        "train/dogs/text.jpg": b"no image",
        "train/dogs/black-1.jpg": encode_jpeg(np.zeros((120, 160, 3), np.uint8)),
        "train/dogs/black-2.jpg": encode_jpeg(np.zeros((121, 160, 3), np.uint8)),
        "train/dogs/white.jpg": encode_jpeg(np.full((120, 160, 3), 255, np.uint8)),
        "train/dogs/blurred.jpg": encode_jpeg(blurred),
        "train/dogs/long.jpg": encode_jpeg(draw_spots(40, 160, 903)),
        "train/dogs/huge.jpg": encode_jpeg(draw_spots(500, 700, 904)),
        "train/dogs/png.jpg": png.getvalue(),
    }


SETS = {"train/cats": 8, "train/dogs": 8, "validation/cats": 4, "validation/dogs": 4}
ISSUES = {
    "train/cats/0.jpg": {"duplicate", "leakage"},
    "train/cats/copy-1.jpg": {"duplicate", "leakage"},
    "validation/cats/copy-2.jpg": {"duplicate", "leakage"},
    "train/cats/1.jpg": {"near_duplicate", "leakage"},
    "validation/cats/smaller.jpg": {"near_duplicate", "leakage"},
    "train/cats/2.jpg": {"duplicate", "conflict"},
    "train/dogs/conflict.jpg": {"duplicate", "conflict"},
    "train/dogs/3.jpg": {"duplicate"},
    "train/dogs/copy.jpg": {"duplicate"},
    "train/cats/truncated.jpg": {"corrupt"},
    "train/cats/empty.jpg": {"corrupt"},
    "train/dogs/text.jpg": {"corrupt"},
    "train/dogs/black-1.jpg": {"dark", "low_information"},
    "train/dogs/black-2.jpg": {"dark", "low_information"},
    "train/dogs/white.jpg": {"light", "low_information"},
    "train/dogs/blurred.jpg": {"blurry"},
    "train/dogs/long.jpg": {"odd_aspect_ratio"},
    "train/dogs/huge.jpg": {"odd_size"},
    "train/dogs/png.jpg": {"wrong_extension"},
}
EXCLUDED = {
    "train/cats/0.jpg": "leakage",
    "train/cats/copy-1.jpg": "leakage",
    "train/cats/1.jpg": "leakage",
    "train/cats/2.jpg": "conflict",
    "train/dogs/conflict.jpg": "conflict",
    "train/cats/truncated.jpg": "truncated",
    "train/cats/empty.jpg": "empty",
    "train/dogs/text.jpg": "unsupported",
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return `write(name, content)`, which writes a file into the test's folder."""

    def write_file(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write_file


def base_name(path: str) -> str:
    return path.rpartition("/")[2]


def read_files(output: str) -> dict[str, dict[str, Any]]:
    rows = read_table(storage.read_bytes(f"{output}/files.parquet")).to_pylist()
    by_path = {row["path"]: row for row in rows}
    assert [*by_path] == sorted(row["path"] for row in rows)
    return by_path


def read_pairs(output: str, root: str) -> set[tuple[object, ...]]:
    rows = read_table(storage.read_bytes(f"{output}/pairs.parquet")).to_pylist()
    return {tuple(str(value).removeprefix(f"{root}/") for value in row.values()) for row in rows}


def read_excluded(output: str) -> dict[str, str]:
    return {
        row["path"]: row["reason"]
        for row in csv.DictReader(io.StringIO(storage.read_bytes(f"{output}/exclude.csv").decode()))
    }


@pytest.mark.parametrize("place", ["local", "s3"])
def test_planted_issues_are_found_and_training_goes_without_them(tmp_path, place, request):
    root = str(tmp_path) if place == "local" else f"s3://{request.getfixturevalue('bucket')}"
    put = request.getfixturevalue("write" if place == "local" else "put")
    planted = build_planted()
    for path, content in planted.items():
        put(f"data/{path}", content)
    data, output = f"{root}/data", f"{root}/audit"
    summary = audit(AuditConfig(data_dir=data, output=output))
    files = read_files(output)
    found = {path.removeprefix(f"{data}/"): {*row["issues"]} for path, row in files.items() if row["issues"]}
    assert {*files} == {f"{data}/{path}" for path in planted}
    assert found == ISSUES
    assert read_excluded(output) == {f"{data}/{path}": reason for path, reason in EXCLUDED.items()}
    found_pairs = read_pairs(output, data)
    assert {(a, b, kind) for a, b, kind, *_ in found_pairs} == {
        ("train/cats/0.jpg", "train/cats/copy-1.jpg", "exact"),
        ("train/cats/0.jpg", "validation/cats/copy-2.jpg", "exact"),
        ("train/cats/copy-1.jpg", "validation/cats/copy-2.jpg", "exact"),
        ("train/cats/1.jpg", "validation/cats/smaller.jpg", "near"),
        ("train/cats/2.jpg", "train/dogs/conflict.jpg", "exact"),
        ("train/dogs/3.jpg", "train/dogs/copy.jpg", "exact"),
    }
    assert ("train/cats/2.jpg", "train/dogs/conflict.jpg", "exact", "0", "False", "False") in found_pairs
    assert summary["by_status"] == {"empty": 1, "ok": 36, "truncated": 1, "unsupported": 1}
    assert summary == json.loads(storage.read_bytes(f"{output}/audit.json"))
    check_training(output, found_pairs, data)
    page = storage.read_bytes(f"{output}/report.html").decode()
    assert [title in page for title in ("Leaks", "Conflicts", "Odd images", "truncated")] == [True] * 4
    assert page.count("<img") == 2 * 5 + 7  # pairs, of each kind without a common image; odd images


def check_training(output: str, found_pairs: set[tuple[object, ...]], data: str) -> None:
    """Check that `train` takes the tables, and that no pair is on both sides then."""
    source = LabelSource(labels=f"{output}/files.parquet", exclude=f"{output}/exclude.csv")
    found = labels.list_training(source, 0.15)
    sides = [{*side.files["path"].to_pylist()} for side in (found.train, found.validation)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == len(read_files(output)) - len(EXCLUDED)
    for a, b, *_ in found_pairs:
        assert len([side for side in sides if {f"{data}/{a}", f"{data}/{b}"} & side]) < 2


def test_a_set_without_splits_is_split_without_a_pair_on_both_sides(tmp_path, write):
    for i in range(24):
        write(f"data/{('cats', 'dogs')[i % 2]}/{i}.jpg", spots_jpeg(i))
        if i < 12:
            write(f"data/{('cats', 'dogs')[i % 2]}/copy of {i}.jpg", spots_jpeg(i))
    output = str(tmp_path / "out")
    audit(AuditConfig(data_dir=str(tmp_path / "data"), output=output))
    files = {Path(path).name: row for path, row in read_files(output).items()}
    assert files["copy of 3.jpg"]["group"] == files["3.jpg"]["group"] == files["3.jpg"]["path"]
    assert files["13.jpg"]["group"] is None
    found = labels.list_training(LabelSource(labels=f"{output}/files.parquet"), 0.4)
    sides = [{Path(path).name for path in side.files["path"].to_pylist()} for side in (found.train, found.validation)]
    assert all(
        ({f"{i}.jpg", f"copy of {i}.jpg"} <= sides[0]) != ({f"{i}.jpg", f"copy of {i}.jpg"} <= sides[1])
        for i in range(12)
    )


def test_every_file_has_the_columns_of_the_contract(tmp_path, write):
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = io.BytesIO()
    Image.fromarray(draw_spots(90, 140, 3)).save(rotated, "JPEG", exif=exif)
    gif = io.BytesIO()
    frames = [Image.fromarray(draw_spots(60, 80, seed)) for seed in (4, 5)]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    write("a/rotated.jpg", rotated.getvalue())
    write("a/two.gif", gif.getvalue())
    write("a/none.png", b"")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")
    audit(AuditConfig(input=str(tmp_path / "a"), output=str(tmp_path / "out")))
    table = pq.read_table(tmp_path / "out" / "files.parquet")
    assert ", ".join(table.column_names) == (
        "path, status, error, label, split, width, height, size_bytes, format, extension_ok, orientation, mode, "
        "frames, sha256, phash, brightness, contrast, sharpness, group, issues"
    )
    gone, none, jpeg, animation = table.to_pylist()
    assert (gone["status"], gone["sha256"], gone["issues"]) == ("not_found", None, ["corrupt"])
    assert (none["status"], none["format"], none["size_bytes"]) == ("empty", None, 0)
    assert none["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    names = ("status", "label", "split", "width", "height", "format", "extension_ok", "orientation", "mode", "frames")
    assert [jpeg[name] for name in names] == ["ok", None, None, 140, 90, "JPEG", True, 6, "RGB", 1]
    assert [animation[name] for name in names] == ["ok", None, None, 80, 60, "GIF", True, None, "P", 2]
    assert len(jpeg["phash"]) == 16
    assert all(0 < jpeg[name] < limit for name, limit in (("brightness", 1), ("contrast", 0.5), ("sharpness", 100)))


def test_duplicates_in_another_set_are_leaks(tmp_path, write):
    for i in range(4):
        write(f"pool/{i}.jpg", spots_jpeg(i))
    write("pool/other.jpg", spots_jpeg(1))
    write("test/1.jpg", spots_jpeg(1))
    write("test/copy of 1.jpg", spots_jpeg(1))
    write("test/2.jpg", encode_jpeg(Image.fromarray(draw_spots(120, 160, 2)).resize((100, 75)), 60))
    write("test/9.jpg", spots_jpeg(9))
    table = write("test/table.csv", b"path,label\n1.jpg,cats\n2.jpg,cats\ncopy of 1.jpg,dogs\n9.jpg,dogs\n")
    lines = write("list.txt", "".join(f"{tmp_path}/pool/{name}.jpg\n" for name in "00123").encode())
    lines.write_text(lines.read_text() + f"{tmp_path}/pool/other.jpg\n{tmp_path}/pool/gone.jpg\n")
    config = AuditConfig(input=str(lines), against=str(table), output=str(tmp_path / "out"))
    summary = audit(config)
    files = {base_name(path): row for path, row in read_files(str(tmp_path / "out")).items()}
    leaking = {"1.jpg", "2.jpg", "other.jpg"}
    assert {*files} == {"0.jpg", "1.jpg", "2.jpg", "3.jpg", "other.jpg", "gone.jpg"}  # a repeated path once
    assert {name for name, row in files.items() if "leakage" in row["issues"]} == leaking
    assert {base_name(path) for path in read_excluded(str(tmp_path / "out"))} == leaking | {"gone.jpg"}
    rows = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    crossing = {(base_name(row["path_a"]), base_name(row["path_b"])) for row in rows if row["cross_split"]}
    assert crossing == {
        ("1.jpg", "1.jpg"),
        ("1.jpg", "copy of 1.jpg"),
        ("other.jpg", "1.jpg"),
        ("other.jpg", "copy of 1.jpg"),
        ("2.jpg", "2.jpg"),
    }
    assert (summary["against"]["files"], summary["pairs"]["cross_split"]) == (4, 5)


def test_what_training_would_refuse_is_reported(tmp_path, write):
    for split, names in (("train", ("cats", "dogs")), ("val", ("cats",)), ("test", ("cats", "birds"))):
        for name in names:
            write(f"data/{split}/{name}/video1-{name}.jpg", spots_jpeg(len(split + name)))
    (tmp_path / "data" / "train" / "empty").mkdir()
    settings = {"data_dir": str(tmp_path / "data"), "group_by": r"(video\d)-cats"}
    summary = audit(AuditConfig(output=str(tmp_path / "out"), **settings))
    assert summary["by_split"] == {"test": 2, "train": 2, "validation": 1}
    assert summary["missing_classes"] == {
        "train": ["birds", "empty"],
        "validation": ["birds", "dogs", "empty"],
        "test": ["dogs", "empty"],
    }
    assert summary["examples_of_such_groups"] == {"video1": ["test", "train", "validation"]}
    assert {row["group"] for row in read_files(str(tmp_path / "out")).values()} == {"video1", None}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 groups in more than one split" in page
    assert "No images in validation of" in page


def test_a_table_of_one_class_is_audited(tmp_path, write, monkeypatch):
    monkeypatch.setattr(outputs, "ROW_GROUP", 3)
    rows = [{"path": f"{i}.jpg", "label": "cats", "group": f"g{i // 2}"} for i in range(4)]
    for row in rows:
        write(row["path"], spots_jpeg(int(row["path"][0])))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    write("out/pairs.parquet", b"of an earlier audit")
    summary = audit(AuditConfig(labels=str(tmp_path / "labels.parquet"), output=str(tmp_path / "out")))
    assert (summary["by_label"], summary["by_split"], summary["groups"]) == ({"cats": 4}, {}, 2)
    assert pq.read_metadata(tmp_path / "out" / "files.parquet").num_row_groups == 2
    assert [base_name(path) for path in read_files(str(tmp_path / "out"))] == [row["path"] for row in rows]
    assert pq.read_table(tmp_path / "out" / "pairs.parquet").num_rows == 0


def test_corrupt_files_take_no_place_of_odd_images(tmp_path, write):
    for i in range(3):
        write(f"data/{i}.png", spots_jpeg(i)[:-200])
    write("data/9.png", spots_jpeg(9))
    summary = audit(AuditConfig(input=str(tmp_path / "data"), output=str(tmp_path / "out")))
    assert (summary["by_status"], summary["by_issue"]["wrong_extension"]) == ({"ok": 1, "truncated": 3}, 4)
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == 1


def test_an_audit_that_cannot_be_written_leaves_no_summary(tmp_path, write):
    write("data/1.jpg", spots_jpeg(1))
    write("data/2\r.jpg", b"")
    config = AuditConfig(input=str(tmp_path / "data"), output=str(tmp_path / "out"))
    audit(config)
    assert labels.Exclusion.read(str(tmp_path / "out" / "exclude.csv"), None).paths == {f"{tmp_path}/data/2\r.jpg"}
    (tmp_path / "out" / "pairs.parquet").unlink()
    (tmp_path / "out" / "pairs.parquet").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        audit(config)
    assert not (tmp_path / "out" / "audit.json").exists()


def test_the_command_says_what_is_not_in_the_counts(tmp_path, write, capsys, monkeypatch):
    start_ray()
    monkeypatch.setattr(pairs, "MAX_PAIRED", 1)
    for path in ("train/cats/a.jpg", "test/cats/a.jpg"):
        write(f"data/{path}", spots_jpeg(1))
    arguments = ["--data-dir", f"{tmp_path}/data", "--output", f"{tmp_path}/out", "--group-by", "(a).jpg"]
    assert main(["audit", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "2 files: 2 leakage, 2 duplicate; see" in shown  # as a group, though they are not paired
    assert "2 sets of too many similar images (over 1 exact, over 1 near) were not paired" in shown
    assert "1 groups are in more than one split" in shown
    assert f"to train without 1 of them, add --exclude {tmp_path}/out/exclude.csv" in shown


def test_fail_on_exits_with_3_if_the_issue_is_found(tmp_path, write, capsys):
    start_ray()  # or the command would end the session's Ray when it returns
    for name in ("a", "b"):
        write(f"data/{name}.jpg", spots_jpeg(1))
    arguments = ["audit", "--input", f"{tmp_path}/data", "--output", f"{tmp_path}/out", "--fail-on"]
    assert main([*arguments, "leakage,corrupt"]) == 0
    assert f"2 files: 2 duplicate; see {tmp_path}/out/report.html" in capsys.readouterr().out
    assert main([*arguments, "corrupt, duplicate"]) == 3
    assert "--fail-on: found 2 duplicate" in capsys.readouterr().err
