"""Labels over real folders and a real S3 endpoint; the files are empty, since only their names count."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from catsdogs import labels, storage
from catsdogs.errors import InputError
from catsdogs.labels import LabelledFiles
from catsdogs.progress import Message
from catsdogs.schema import LABELLED_FILES


def fill(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def images(folder: str, count: int, start: int = 0) -> list[str]:
    return [f"{folder}/{i:03}.jpg" for i in range(start, start + count)]


def map_classes(labelled: LabelledFiles, root: str) -> dict[str, str]:
    """Map each path below the root to its class."""
    rows = labelled.files.to_pylist()
    return {row["path"][len(root) + 1 :]: labelled.class_names[row["true_index"]] for row in rows}


def make_labelled(root: str, counts: dict[str, int]) -> LabelledFiles:
    names = tuple(sorted(counts))
    rows = [(f"{root}/{name}/{i}.jpg", None, None, k) for k, name in enumerate(names) for i in range(counts[name])]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=LABELLED_FILES)
    return LabelledFiles(names, table)


# Which folders are splits and classes


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("test", "val", "validation"), "validation"),
        (("test", "val"), "val"),
        (("test",), "test"),
    ],
)
def test_validation_comes_before_val_before_test(tmp_path, present, chosen):
    splits = ("train", *present)
    root = fill(tmp_path, *(f"{split}/{label}/{split}.jpg" for split in splits for label in ("cats", "dogs")))
    train, validation = labels.list_training(root, 0.15)
    assert map_classes(train, root) == {"train/cats/train.jpg": "cats", "train/dogs/train.jpg": "dogs"}
    assert map_classes(validation, root) == {f"{chosen}/{c}/{chosen}.jpg": c for c in ("cats", "dogs")}
    assert labels.list_evaluation(root, None).files == validation.files
    assert map_classes(labels.list_evaluation(root, "train"), root) == map_classes(train, root)


def test_a_validation_folder_without_classes_is_ignored(tmp_path):
    (tmp_path / "validation").mkdir()
    root = fill(tmp_path, *(f"{split}/{label}/1.jpg" for split in ("train", "val") for label in ("a", "b")))
    assert list(map_classes(labels.list_training(root, 0.15)[1], root)) == ["val/a/1.jpg", "val/b/1.jpg"]


def test_table_has_the_schema_and_is_sorted_by_path(tmp_path):
    root = fill(tmp_path, "b/2.jpg", "b/1.jpg", "a-/x.jpg", "a/x.jpg", "a/deep/er/y.jpg")
    files = labels.list_evaluation(root, None).files
    assert files.schema.equals(LABELLED_FILES)
    found = files["path"].to_pylist()
    assert found == sorted(found)
    assert files["size_bytes"].to_pylist() == [0] * 5
    assert None not in files["version"].to_pylist()


def test_class_folders_directly_are_classes_in_sorted_order(tmp_path):
    root = fill(
        tmp_path,
        "dogs/1.jpg",
        "Zebras/1.jpg",
        "cats/1.jpg",
        "żaby/1.jpg",
        "dogs/old/2.jpg",
        "dogs/cats/3.jpg",
    )
    labelled = labels.list_evaluation(root, None)
    assert labelled.class_names == ("Zebras", "cats", "dogs", "żaby")
    assert map_classes(labelled, root) == {
        "Zebras/1.jpg": "Zebras",
        "cats/1.jpg": "cats",
        "dogs/1.jpg": "dogs",
        "dogs/cats/3.jpg": "dogs",
        "dogs/old/2.jpg": "dogs",
        "żaby/1.jpg": "żaby",
    }


def test_hidden_folders_and_images_outside_of_class_folders_are_ignored(tmp_path):
    root = fill(
        tmp_path,
        "train/.ipynb_checkpoints/1.jpg",
        "train/__MACOSX/1.jpg",
        "train/outside.jpg",
        "outside.jpg",
        "other/1.jpg",
        *images("train/cats", 9),
        *images("train/dogs", 9),
    )
    train, validation = labels.list_training(root, 0.3)
    assert train.class_names == validation.class_names == ("cats", "dogs")
    assert {**map_classes(train, root), **map_classes(validation, root)} == {
        name: name.split("/")[1] for name in (*images("train/cats", 9), *images("train/dogs", 9))
    }


def test_a_class_whose_name_is_not_utf8_is_a_class(tmp_path):
    root = fill(tmp_path, "a/1.jpg")
    folder = storage.local_path(root) + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/1.jpg", "wb"):
        pass
    assert labels.list_evaluation(root, None).class_names == ("a", "caf%E9")


def test_what_cannot_be_listed_is_reported(tmp_path):
    root = fill(tmp_path, "a/1.jpg", "b/1.jpg")
    os.mkfifo(f"{root}/b/pipe.jpg")
    messages: list[Message] = []
    labels.list_evaluation(root, None, lambda event: messages.append(event) if isinstance(event, Message) else None)
    assert messages == [Message(f"could not list {root}/b/pipe.jpg: not a regular file")]


# Input errors


@pytest.mark.parametrize(
    ("files", "folders", "words"),
    [
        ([], [], "no images under ROOT: looked at 0 files, 0 images; expected files such as .jpg"),
        (["a/1.mov", "a/2.MOV", "x"], [], "no images under ROOT: looked at 3 files, 0 images: 2 .mov, 1 without"),
        (["1.jpg", "2.jpg"], [], "no class folders under ROOT: expected one folder of images per class"),
        (["cats/1.jpg", "dogs/1.txt"], ["mice"], "no images in class 'dogs', 'mice' under ROOT"),
        (["train/cats/1.jpg"], ["train/dogs"], "no images in class 'dogs' under ROOT/train"),
        (["cats/1.jpg", "cats/2.jpg"], [], "one class only, 'cats', under ROOT"),
        (["cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg"], [], "class 'cats' has only one image"),
        (
            ["train/cats/1.jpg", "train/dogs/1.jpg", "val/cats/1.jpg", "val/Dogs/1.jpg"],
            [],
            "the classes differ: train has 'cats', 'dogs', val has 'Dogs', 'cats'; "
            "only in train: 'dogs'; only in val: 'Dogs'",
        ),
    ],
)
def test_input_errors_are_one_line(tmp_path, files, folders, words):
    root = fill(tmp_path, *files)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        labels.list_training(root, 0.15)
    assert words.replace("ROOT", root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_an_input_error(tmp_path):
    root = fill(tmp_path, "validation/a/1.jpg", "validation/b/1.jpg")
    with pytest.raises(InputError, match=f"no class folders under {root}/holdout; check --data-dir and --split"):
        labels.list_evaluation(root, "holdout")


def test_a_message_shows_only_the_first_class_names():
    with pytest.raises(InputError) as caught:
        labels.check_same_classes([f"c{i:03}" for i in range(1000)], ["x"], "the checkpoint", "data")
    assert "'c009' and 990 more" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_order_of_class_names_does_not_matter():
    labels.check_same_classes(("b", "a"), ("a", "b"), "the checkpoint", "data")


# The split


def test_every_class_is_split_without_a_validation_folder(tmp_path):
    root = fill(tmp_path, *images("train/cats", 60), *images("train/dogs", 90))
    train, validation = labels.list_training(root, 0.2)
    assert train.files.num_rows + validation.files.num_rows == 150
    assert not set(train.files["path"].to_pylist()) & set(validation.files["path"].to_pylist())
    for index, count in ((0, 60), (1, 90)):
        share = validation.files["true_index"].to_pylist().count(index) / count
        assert 0.08 < share < 0.35


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
def test_each_class_is_split_near_the_fraction(fraction):
    counts = {"cats": 4000, "dogs": 1000, "mice": 400}
    _, validation = labels.split(make_labelled("/data", counts), fraction, "/data")
    found = np.bincount(validation.files["true_index"].to_numpy())
    for share, count in zip(found / list(counts.values()), counts.values(), strict=True):
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / count) ** 0.5


def test_files_stay_in_their_split_when_others_are_added():
    few, many = make_labelled("/data", {"a": 100, "b": 120}), make_labelled("/data", {"a": 900, "b": 121})
    train, validation = labels.split(few, 0.15, "/data")
    train_then, validation_then = labels.split(many, 0.15, "/data")
    assert set(train.files["path"].to_pylist()) < set(train_then.files["path"].to_pylist())
    assert set(validation.files["path"].to_pylist()) <= set(validation_then.files["path"].to_pylist())


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_no_split_is_empty(fraction, count):
    train, validation = labels.split(make_labelled("/data", {"a": count, "b": count}), fraction, "/data")
    assert set(train.files["true_index"].to_pylist()) == set(validation.files["true_index"].to_pylist()) == {0, 1}


def test_the_split_is_the_same_from_s3_a_local_folder_and_elsewhere(tmp_path, bucket, put):
    names = [*images("train/cats", 20), *images("train/dogs é %", 20)]
    local = fill(tmp_path / "data", *names)
    elsewhere = fill(tmp_path / "another place", *names)
    for name in names:
        put(f"prefix/{name}", b"")
    found = []
    for root in (local, elsewhere, f"s3://{bucket}/prefix"):
        train, validation = labels.list_training(root, 0.3)
        found.append((map_classes(train, root), map_classes(validation, root)))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) + len(found[0][1]) == 40


def test_the_split_of_names_that_are_not_utf8_does_not_depend_on_the_root():
    positions = []
    for root in ("/data", "/somewhere/else"):
        names = [f"file://{root}/a/%FF{i}.jpg" for i in range(50)] + [f"{root}/b/{i}.jpg" for i in range(50)]
        table = pa.table([names, [None] * 100, [None] * 100, [0] * 50 + [1] * 50], schema=LABELLED_FILES)
        _, validation = labels.split(LabelledFiles(("a", "b"), table), 0.3, root)
        positions.append([names.index(path) for path in validation.files["path"].to_pylist()])
    assert positions[0] == positions[1]
