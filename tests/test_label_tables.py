"""Labels from tables of each form, over real files and a real S3 endpoint; the images are empty files."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from spots import draw_spots, encode_jpeg

from catsdogs import labels
from catsdogs.errors import InputError
from catsdogs.labels import LabelledFiles, LabelSource
from catsdogs.progress import Message
from catsdogs.table_files import format_csv

Rows = list[dict[str, object]]
CLASSES = ("cats", "dogs")
EXTENSIONS = ("csv", "tsv", "parquet", "jsonl")


def encode_table(extension: str, rows: Rows) -> bytes:
    """Write rows as a file; a row without one of the columns has none there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    sink = pa.BufferOutputStream()
    if extension == "parquet":
        pq.write_table(table, sink)
    elif extension == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        delimiter = "," if extension == "csv" else "\t"
        pa.csv.write_csv(table, sink, pa.csv.WriteOptions(delimiter=delimiter))
    return bytes(sink.getvalue())


def write_table(folder: Path, rows: Rows, name: str = "labels.csv") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_table(name.rpartition(".")[2], rows))
    return str(path)


def rows_of(*splits: str | None, count: int = 4) -> Rows:
    """Name `count` images of each class, in each split."""
    return [
        {"path": f"{split or 'all'}/{label}-{i}.jpg", "label": label} | ({"split": split} if split else {})
        for split in splits
        for label in CLASSES
        for i in range(count)
    ]


def map_classes(files: LabelledFiles) -> dict[str, str]:
    return {row["path"]: files.class_names[row["true_index"]] for row in files.files.to_pylist()}


def list_with_messages(source: LabelSource, val_split: float = 0.3) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """List the training and the validation files; return them and the messages."""
    messages: list[str] = []
    found = labels.list_training(
        source, val_split, lambda event: messages.append(event.text) if isinstance(event, Message) else None
    )
    return map_classes(found.train), map_classes(found.validation), messages


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("path_column", ["path", "file_name", "image"])
def test_a_table_of_each_form_has_the_same_rows(tmp_path, extension, path_column):
    rows = [{path_column: row["path"], "note": "x", **row} for row in rows_of("train", "val")]
    for row in rows:
        del row["path" if path_column != "path" else "note"]
    table = write_table(tmp_path, rows, f"labels.{extension}")
    train, validation, messages = list_with_messages(LabelSource(labels=table))
    assert train == {f"{tmp_path}/train/{label}-{i}.jpg": label for label in CLASSES for i in range(4)}
    assert validation == {f"{tmp_path}/val/{label}-{i}.jpg": label for label in CLASSES for i in range(4)}
    assert messages == [
        f"2 classes, 'cats', 'dogs': 8 training images in {table}, 8 validation images of its split validation"
    ]


def test_the_split_of_a_table_is_that_of_folders(tmp_path):
    for label in CLASSES:
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(30):
            (tmp_path / "data" / label / f"{i}.jpg").touch()
    rows: Rows = [{"path": f"{label}/{i}.jpg", "label": label} for label in CLASSES for i in range(30)]
    folder = str(tmp_path / "data")
    expected = list_with_messages(LabelSource(folder))[:2]
    assert 0 < len(expected[1]) < 30
    beside = write_table(tmp_path / "data", rows)
    elsewhere = write_table(tmp_path, rows, "labels.parquet")
    absolute = write_table(tmp_path, [row | {"path": f"{folder}/{row['path']}"} for row in rows], "absolute.jsonl")
    assert list_with_messages(LabelSource(labels=beside))[:2] == expected
    for table in (elsewhere, absolute):
        assert list_with_messages(LabelSource(folder, table))[:2] == expected
        found, listed = (
            labels.list_training(source, 0.3) for source in (LabelSource(folder, table), LabelSource(folder))
        )
        assert found.train.files.equals(listed.train.files)
        assert found.validation.files.equals(listed.validation.files)
    message = list_with_messages(LabelSource(folder, elsewhere))[2][0]
    assert message.endswith("held out of the same rows (--val-split 0.3)")


def test_tables_and_images_may_be_on_s3(tmp_path, bucket, put):
    rows = rows_of("train", "test")
    put("data/labels.csv", encode_table("csv", rows))
    in_store = list_with_messages(LabelSource(labels=f"s3://{bucket}/data/labels.csv"))[:2]
    here = write_table(tmp_path, rows)
    full = [row | {"path": f"s3://{bucket}/data/{row['path']}"} for row in rows]
    assert in_store[0] == {row["path"]: row["label"] for row in full[:8]}
    assert list_with_messages(LabelSource(f"s3://{bucket}/data", here))[:2] == in_store
    assert list_with_messages(LabelSource(labels=write_table(tmp_path, full, "full.csv")))[:2] == in_store
    put("data/local.csv", encode_table("csv", [{"path": "/etc/passwd", "label": "cats"}]))
    with pytest.raises(InputError, match="line 2: expected a relative path or one of s3://, got /etc/passwd"):
        list_with_messages(LabelSource(labels=f"s3://{bucket}/data/local.csv"))


@pytest.mark.parametrize(
    ("splits", "validation", "unused"),
    [
        (("train", "val", "test"), "validation", "; not used: 8 of the split test"),
        (("Train", "VALIDATION"), "validation", ""),
        (("train", "test"), "test", ""),
    ],
)
def test_test_rows_validate_only_without_others(tmp_path, splits, validation, unused):
    table = write_table(tmp_path, rows_of(*splits))
    train, found, (message,) = list_with_messages(LabelSource(labels=table))
    assert {path.rpartition("/")[0] for path in train} == {f"{tmp_path}/{splits[0]}"}
    assert {path.rpartition("/")[0] for path in found} == {f"{tmp_path}/{splits[1]}"}
    assert message.endswith(f" of its split {validation}{unused}")


def test_a_table_with_training_rows_only_is_split(tmp_path):
    train, validation, _ = list_with_messages(LabelSource(labels=write_table(tmp_path, rows_of("train", count=30))))
    assert len(train) + len(validation) == 60
    assert {*train.values()} == {*validation.values()} == {*CLASSES}


def test_evaluation_takes_the_named_split_or_all(tmp_path):
    def list_paths(table: str, split: str | None) -> set[str]:
        found = labels.list_evaluation(LabelSource(labels=table), split)
        return {path.split("/")[-2] for path in found.files["path"].to_pylist()}

    table = write_table(tmp_path, rows_of("train", "val", "test"))
    assert [list_paths(table, split) for split in (None, "train", "val", "Test")] == [
        {"val"},
        {"train"},
        {"val"},
        {"test"},
    ]
    assert list_paths(write_table(tmp_path, rows_of(None)), None) == {"all"}
    only_train = write_table(tmp_path, rows_of("train"))
    with pytest.raises(InputError, match="expected rows with the split validation, found 'train'; name the split with"):
        list_paths(only_train, None)
    with pytest.raises(InputError, match="expected rows with the split holdout, found 'train'; check --split"):
        list_paths(only_train, "holdout")


# Groups


@pytest.mark.parametrize("by_column", [True, False])
def test_no_group_is_in_both_splits(tmp_path, by_column):
    rows: Rows = [
        {"path": f"video{video}/{label}/{i}.jpg", "label": label} | ({"group": video} if by_column else {})
        for video in range(40)
        for label in CLASSES
        for i in range(5)
    ]
    source = LabelSource(labels=write_table(tmp_path, rows), group_by=None if by_column else r"(video\d+)/")
    train, validation, _ = list_with_messages(source)
    videos = [{path.split("/")[-3] for path in paths} for paths in (train, validation)]
    assert not videos[0] & videos[1]
    assert len(videos[0] | videos[1]) == 40
    assert {*train.values()} == {*validation.values()} == {*CLASSES}


def test_copies_of_an_image_are_on_one_side_here_and_on_s3(tmp_path, bucket, put):
    """200 images are stored 5 times under one group each; folders and a table give the same split in both places."""
    drawn = {f"{CLASSES[i % 2]}/{i:03}": encode_jpeg(draw_spots(16, 16, i)) for i in range(200)}
    images = {f"{name}-{copy}.jpg": content for name, content in drawn.items() for copy in range(5)}
    rows: Rows = [{"path": path, "label": path[:4], "group": path[5:8]} for path in images]
    table = write_table(tmp_path, rows)
    for path, content in images.items():
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path).write_bytes(content)
        put(f"data/{path}", content)
    found = []
    for folder in (f"{tmp_path}/data", f"s3://{bucket}/data"):
        for source in (LabelSource(folder, group_by=r"/(\d+)-"), LabelSource(folder, table)):
            sides = list_with_messages(source, 0.15)[:2]
            found.append([{path.removeprefix(f"{folder}/") for path in side} for side in sides])
    train, validation = found[0]
    assert found == [[train, validation]] * 4
    assert train | validation == {*images}
    groups = [{path[5:8] for path in side} for side in (train, validation)]
    assert not groups[0] & groups[1]
    assert (len(groups[0]) + len(groups[1]), len(groups[1]) > 10) == (200, True)


def test_a_path_without_a_match_is_a_group_of_its_own(tmp_path):
    rows = rows_of(None, count=60)
    plain = list_with_messages(LabelSource(labels=write_table(tmp_path, rows)))[:2]
    grouped = LabelSource(labels=write_table(tmp_path, rows), group_by=r"video(\d+)|all/()")
    assert list_with_messages(LabelSource(labels=grouped.labels, group_by=r"video(\d+)"))[:2] == plain
    *splits, messages = list_with_messages(LabelSource(labels=grouped.labels, group_by=r"all(x)?"))
    assert tuple(splits) == plain
    assert "--group-by: 0 groups; 120 images without a first capture, such as all/cats-0.jpg" in messages


def test_a_group_in_two_given_splits_is_refused(tmp_path):
    rows = rows_of("train", "val")
    source = LabelSource(labels=write_table(tmp_path, rows), group_by=r"(cats-0)")
    with pytest.raises(InputError) as caught:
        list_with_messages(source)
    assert "expected each group in one split only, found 'cats-0' in both, such as " in str(caught.value)
    for row in rows:
        path = tmp_path / str(row["split"]) / str(row["label"]) / str(row["path"]).rpartition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(InputError, match=r"found 'cats-0' in both, such as .*/train/cats/cats-0.jpg for training"):
        list_with_messages(LabelSource(str(tmp_path), group_by=r"(cats-0)"))


# Excluded images


@pytest.mark.parametrize("from_table", [True, False])
def test_excluded_images_are_left_out_and_counted(tmp_path, from_table):
    for label in CLASSES:
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "data" / label / f"{i}.jpg").touch()
    folder = str(tmp_path / "data")
    table = write_table(
        tmp_path, [{"path": f"{label}/{i}.jpg", "label": label} for label in CLASSES for i in range(10)]
    )
    excluded = ["cats/3.jpg", f"{folder}/dogs/7.jpg", "dogs/elsewhere.jpg"]
    exclude = write_table(tmp_path, [{"path": path, "reason": "dark"} for path in excluded], "exclude.csv")
    source = LabelSource(folder, table if from_table else None, exclude)
    train, validation, messages = list_with_messages(source)
    expected = {f"{folder}/{label}/{i}.jpg" for label in CLASSES for i in range(10)}
    assert {*train, *validation} == expected - {f"{folder}/cats/3.jpg", f"{folder}/dogs/7.jpg"}
    assert messages[0] == f"2 of the 3 images in {exclude} are left out"
    assert labels.list_evaluation(source, None).files.num_rows == 18


@pytest.mark.parametrize("name", ["carriage\rreturn", "line\r\nend", 'a "quoted", name', "=1;2\t3", "\ufeffmark"])
def test_a_table_that_a_command_writes_has_any_file_name(tmp_path, name):
    (tmp_path / "exclude.csv").write_bytes(format_csv([("path", "reason"), (f"/x/{name}.jpg", None)]).encode())
    exclusion = labels.Exclusion.read(str(tmp_path / "exclude.csv"), None)
    assert exclusion.paths == {f"/x/{name}.jpg"}


def test_a_comma_that_is_not_quoted_excludes_no_other_image(tmp_path):
    (tmp_path / "exclude.csv").write_text("path\na, b.jpg\n")
    with pytest.raises(InputError, match="expected 1 field as in the header, found 2 in line 2"):
        labels.Exclusion.read(str(tmp_path / "exclude.csv"), None)


def test_everything_cannot_be_excluded(tmp_path):
    table = write_table(tmp_path, rows_of(None))
    with pytest.raises(InputError, match="leaves out all 8 images; expected some to stay"):
        list_with_messages(LabelSource(labels=table, exclude=table))


# Tables that are refused


def test_the_same_row_twice_counts_once(tmp_path):
    rows = rows_of("train", "val")
    once = list_with_messages(LabelSource(labels=write_table(tmp_path, rows)))[:2]
    assert list_with_messages(LabelSource(labels=write_table(tmp_path, rows + rows)))[:2] == once


def test_labels_may_be_numbers_and_have_spaces_around_them(tmp_path):
    table = pa.table({"path": ["a.jpg", "b.jpg", "c.jpg"], "label": pa.array([1.0, 0.0, 1.0]), "split": [None] * 3})
    pq.write_table(table, tmp_path / "labels.parquet")
    found = labels.list_evaluation(LabelSource(labels=str(tmp_path / "labels.parquet")), None)
    assert [*map_classes(found).values()] == ["1", "0", "1"]
    (tmp_path / "labels.csv").write_text("path, label\na.jpg, cats\nb.jpg,dogs\nc.jpg,cats \n")
    found = labels.list_evaluation(LabelSource(labels=str(tmp_path / "labels.csv")), None)
    assert [*map_classes(found).values()] == ["cats", "dogs", "cats"]


HEADER = "path,label,split,group\n"
REFUSED = {
    "two labels": (HEADER + "a,x\nb,y\na,y\n", "/a has two labels, 'x' in line 2 and 'y' in line 4; expected each"),
    "two labels of two": (
        HEADER + "a,x\nb,y\na,y\nb,x\n",
        "/a has two labels, 'x' in line 2 and 'y' in line 4; 1 more;",
    ),
    "two splits": (HEADER + "a,x,train\na,x,val\n", "/a has two splits, 'train' in line 2 and 'validation' in line 3"),
    "two groups": (HEADER + "a,x,,1\na,x,,2\n", "/a has two groups, '1' in line 2 and '2' in line 3"),
    "no label": (HEADER + "a,x\nb,\nc, \n\nd\n", "expected a label in each row, found none in lines 3, 4, 6"),
    "no labels": (HEADER + "a,\n" * 9, "found none in lines 2, 3, 4, 5, 6 and 4 more"),
    "unknown split": (HEADER + "a,x,holdout\nb,y,train\n", "validation, val, test as split, found 'holdout' in line 2"),
    "some splits": (HEADER + "a,x,train\nb,y,\n", "expected a split in each row or in none, found none in line 3"),
    "no path": (HEADER + "a,x\n,y\n", "line 3: expected a path, got ''"),
    "no path column": ("file,label\na,x\n", "named path, file_name or image: there is none, only file, label"),
    "no label column": ("path,class\na,x\n", "expected a column named label: there is none, only path, class"),
    "two label columns": ("path,label,label\na,x,x\n", "expected a column named label: there are several"),
    "empty": ("", "expected rows with path and label, found none"),
    "header alone": (HEADER, "expected rows with path and label, found none"),
    "one label": (HEADER + "a,x\nb,x\n", "expected two or more labels, found only 'x'"),
    "other classes": (
        HEADER + "a,x,train\nb,y,train\nc,x,val\nd,z,val\n",
        "LABELS has 'x', 'y', its split validation has 'x', 'z'",
    ),
    "no training rows": (HEADER + "a,x,val\nb,y,val\n", "expected rows with the split train, found only 'validation'"),
    "http": (HEADER + "http://10.0.0.1/a.jpg,x\n", "line 2: expected a relative path or one of this machine, "),
    "unknown scheme": (HEADER + "ftp://host/a.jpg,x\n", "line 2: expected a relative path or one of this machine, "),
    "credentials": (HEADER + "s3://key:secret@bucket/a.jpg,x\n", "line 2: a URI with credentials in it"),
    "quote": (HEADER + 'a,x\n"b,y\n', "cannot read this table after line 2: unexpected end of data"),
    "a comma": (
        "path,label\na,x\nb,c,y\n",
        "expected 2 fields as in the header, found 3 in line 3; quote what contains",
    ),
    "latin-1": (
        (HEADER + "ä,x\n").encode("latin-1"),
        "cannot read this table: expected UTF-8, found the byte 0xe4 in line 2",
    ),
    "no Parquet": (b"PAR1", "cannot read this table: "),
    "no JSON": ('{"path": "a", "label": "x"}\n{"path": \n', "after line 1: expected a JSON object in line 2"),
    "a JSON list": ("[1]\n", "expected a JSON object in line 1, got [1]"),
    "a deep JSON list": ("[" * 100_000 + "\n", "expected a JSON object in line 1"),
    "a JSON label": ('{"path": "a", "label": ["x"]}\n', "a whole number as label, split or group, got ['x']"),
    "a JSON path": ('{"path": 7, "label": "x"}\n', "line 1: expected a path, got 7"),
    "half of a JSON surrogate pair": ('{"path": "a", "label": "\\ud800"}\n', "found half of a surrogate pair"),
    "a JSON path with a zero byte": (
        '{"path": "a\\u0000", "label": "x"}\n',
        "line 1: 'FOLDER/a\\x00': expected a path without zero bytes",
    ),
    "a JSON path with half a character": (
        '{"path": "s3://bucket/\\ud800", "label": "x"}\n',
        "found half of a surrogate pair",
    ),
    "a JSON group with half a character": (
        '{"path": "a", "label": "x", "group": "\\ud800"}\n',
        "found half of a surrogate pair",
    ),
    "a fraction": ('{"path": "a", "label": 0.5}\n', "a whole number as label, split or group, got 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, name):
    content, words = REFUSED[name]
    extension = "jsonl" if "JSON" in name or name == "a fraction" else "parquet" if name == "no Parquet" else "csv"
    path = tmp_path / f"labels.{extension}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        list_with_messages(LabelSource(labels=str(path)))
    assert words.replace("LABELS", str(path)).replace("FOLDER", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [lambda folder: f"{folder}/labels.xlsx", lambda folder: f"{folder}/missing.csv"])
def test_a_table_that_is_missing_or_of_another_form_is_refused(tmp_path, make: Callable[[Path], str]):
    (tmp_path / "labels.xlsx").touch()
    with pytest.raises(InputError, match=r"labels\.xlsx: expected a name that ends in \.csv|missing\.csv"):
        list_with_messages(LabelSource(labels=make(tmp_path)))
