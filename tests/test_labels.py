"""Labels over real folders and a real S3 endpoint; the files are empty, since only their names count."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from catsdogs import labels, storage
from catsdogs.errors import InputError
from catsdogs.labels import LabelledFiles, LabelSource
from catsdogs.labels.groups import split_off
from catsdogs.labels.labelled_files import LabelledRow
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
    train, validation, _ = labels.list_training(LabelSource(root), 0.15)
    assert map_classes(train, root) == {"train/cats/train.jpg": "cats", "train/dogs/train.jpg": "dogs"}
    assert map_classes(validation, root) == {f"{chosen}/{c}/{chosen}.jpg": c for c in ("cats", "dogs")}
    assert labels.list_evaluation(LabelSource(root), None).files == validation.files
    assert map_classes(labels.list_evaluation(LabelSource(root), "train"), root) == map_classes(train, root)


def test_a_validation_folder_without_classes_is_ignored(tmp_path):
    (tmp_path / "validation").mkdir()
    root = fill(tmp_path, *(f"{split}/{label}/1.jpg" for split in ("train", "val") for label in ("a", "b")))
    assert list(map_classes(labels.list_training(LabelSource(root), 0.15)[1], root)) == ["val/a/1.jpg", "val/b/1.jpg"]


def test_table_has_the_schema_and_is_sorted_by_path(tmp_path):
    root = fill(tmp_path, "b/2.jpg", "b/1.jpg", "a-/x.jpg", "a/x.jpg", "a/deep/er/y.jpg")
    files = labels.list_evaluation(LabelSource(root), None).files
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
    labelled = labels.list_evaluation(LabelSource(root), None)
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
        *images("train/cats", 9),
        *images("train/dogs", 9),
    )
    train, validation, message = list_with_message(root, 0.3)
    assert train.class_names == validation.class_names == ("cats", "dogs")
    assert {**map_classes(train, root), **map_classes(validation, root)} == {
        name: name.split("/")[1] for name in (*images("train/cats", 9), *images("train/dogs", 9))
    }
    assert message.endswith("; not used: 2 images beside the class folders")


def test_a_class_whose_name_is_not_utf8_is_a_class(tmp_path):
    root = fill(tmp_path, "a/1.jpg")
    folder = storage.local_path(root) + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/1.jpg", "wb"):
        pass
    assert labels.list_evaluation(LabelSource(root), None).class_names == ("a", "caf%E9")


def test_what_cannot_be_listed_is_reported(tmp_path):
    root = fill(tmp_path, "a/1.jpg", "b/1.jpg")
    os.mkfifo(f"{root}/b/pipe.jpg")
    messages: list[Message] = []
    labels.list_evaluation(
        LabelSource(root), None, lambda event: messages.append(event) if isinstance(event, Message) else None
    )
    assert messages[0] == Message(f"could not list {root}/b/pipe.jpg: not a regular file")


# Which folders are splits


def list_with_message(root: str, val_split: float = 0.15, **source: str) -> tuple[LabelledFiles, LabelledFiles, str]:
    """List the training and validation files; return them and the only message."""
    messages: list[Message] = []
    train, validation, _ = labels.list_training(
        LabelSource(root, **source), val_split, lambda e: messages.append(e) if isinstance(e, Message) else None
    )
    (message,) = messages
    return train, validation, message.text


def splits(*folders: str, classes: tuple[str, ...] = ("cats", "dogs")) -> list[str]:
    """Name one image of each class in each folder."""
    return [f"{folder}/{label}/1.jpg" for folder in folders for label in classes]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("training", "validation"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("training_set/training_set", "test_set/test_set"),
        ("Train/train", "Valid"),
        ("train", "Dev"),
        ("seg_train/seg_train", "seg_test/seg_test"),
    ],
)
def test_splits_are_found_under_every_spelling(tmp_path, train, validation):
    root = fill(tmp_path, *splits(train, validation))
    found_train, found_validation, message = list_with_message(root)
    assert map_classes(found_train, root) == {f"{train}/{c}/1.jpg": c for c in ("cats", "dogs")}
    assert map_classes(found_validation, root) == {f"{validation}/{c}/1.jpg": c for c in ("cats", "dogs")}
    assert message == (
        f"2 classes, 'cats', 'dogs': 2 training images in {root}/{train}, 2 validation images in {root}/{validation}"
    )
    assert labels.list_evaluation(LabelSource(root), None).files == found_validation.files
    assert labels.list_evaluation(LabelSource(root), train.split("/")[0].upper()).files == found_train.files


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "VALID"])
def test_validation_wins_over_test_and_the_message_says_so(tmp_path, validation):
    root = fill(tmp_path, *splits("train", "test", validation), "unlabelled/1.jpg", "docs/readme.txt")
    _, found, message = list_with_message(root)
    assert set(map_classes(found, root)) == {f"{validation}/cats/1.jpg", f"{validation}/dogs/1.jpg"}
    assert message.endswith(f" in {root}/{validation}; not used: 'test', 'unlabelled'")


@pytest.mark.parametrize("folder", ["train", "Training", ""])
def test_the_message_says_that_validation_images_are_held_out(tmp_path, folder):
    root = fill(tmp_path, *(f"{folder}/{label}/{i}.jpg".lstrip("/") for label in ("a", "b") for i in range(4)))
    _, validation, message = list_with_message(root, 0.4)
    where = f"{root}/{folder}".rstrip("/")
    num_validation = validation.files.num_rows
    assert message == (
        f"2 classes, 'a', 'b': {8 - num_validation} training images in {where}, "
        f"{num_validation} validation images held out of the same folder (--val-split 0.4)"
    )


def test_a_test_folder_without_labels_is_not_used(tmp_path):
    root = fill(tmp_path, *splits("train"), *(f"train/{label}/2.jpg" for label in ("cats", "dogs")), "test/1.jpg")
    train, validation, message = list_with_message(root)
    assert {*map_classes(train, root).values()} == {*map_classes(validation, root).values()} == {"cats", "dogs"}
    assert message.endswith("; not used: 'test'")


@pytest.mark.parametrize("folder", ["", "train", "validation"])
def test_a_class_may_be_called_train(tmp_path, folder):
    classes = ("bus", "test tube", "train")
    names = [f"{split}/{label}/{i}.jpg" for split in ("train", "validation") for label in classes for i in range(2)]
    root = fill(tmp_path, *names) if folder else fill(tmp_path, *(name.split("/", 1)[1] for name in names[:6]))
    train, validation, _ = labels.list_training(LabelSource(root), 0.5)
    assert train.class_names == validation.class_names == classes
    assert labels.list_evaluation(LabelSource(root), folder or None).class_names == classes


def test_class_names_may_be_numbers(tmp_path):
    root = fill(tmp_path, *splits("Train", "Test", classes=("10", "2", "0")))
    assert labels.list_training(LabelSource(root), 0.15)[0].class_names == ("0", "10", "2")


def test_a_split_may_be_a_link(tmp_path):
    fill(tmp_path / "elsewhere", *splits("images"))
    root = fill(tmp_path / "data", *splits("train"))
    (tmp_path / "data" / "Val").symlink_to(tmp_path / "elsewhere" / "images")
    assert set(map_classes(labels.list_training(LabelSource(root), 0.15)[1], root)) == {
        "Val/cats/1.jpg",
        "Val/dogs/1.jpg",
    }


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cats/1.jpg", "dogs/1.jpg", *splits("test")], "ROOT: 'test' beside 'cats', 'dogs' may be a split or a class"),
        (["cats/1.jpg", "dogs/1.jpg", "Val/1.jpg"], "ROOT: 'Val' beside 'cats', 'dogs' may be a split or a class"),
        ([*splits("train"), "car/1.jpg"], "ROOT: 'train' beside 'car' may be a split or a class"),
        ([*splits("train"), *splits("extra")], "ROOT: 'train' beside 'extra' may be a split or a class"),
        (["train/cat.0.jpg", "test1/1.jpg"], "ROOT: 'test1', 'train' look like splits: rename them"),
        ([*splits("train_images"), *splits("val_images", classes=("cats",))], "'train_images', 'val_images' look like"),
        (splits("training data", "dev-data", "sample_test"), "'dev-data', 'sample_test', 'training data' look like"),
        ([*splits("train_set1", "val_set1"), "other/1.jpg"], "'train_set1' and 'val_set1' contain the same folders"),
        ([*splits("train/train"), *splits("train")], "ROOT/train: 'train' beside 'cats', 'dogs' may be a split or"),
        (splits("Train", "training", "val"), "ROOT has 'Train', 'training': expected one of them"),
        (splits("train", "Val", "val"), "ROOT has 'Val', 'val': expected one of them"),
        (splits("val", "test"), "no train/ under ROOT, only 'test', 'val': expected train/ and validation/"),
        (
            splits("data/train", "data/val"),
            "ROOT/data contains 'train', 'val': expected train/ and validation/ directly",
        ),
        (splits("cats/Train", "cats/Test", "dogs/Train"), "ROOT/cats contains 'Test', 'Train': expected"),
        (["Train/1.jpg", "Test/1.jpg"], "no class folders under ROOT/Train: expected one folder of images per class"),
        (["train/train/1.jpg"], "one class only, 'train', under ROOT/train"),
    ],
)
def test_what_may_be_a_split_or_a_class_is_refused(tmp_path, names, words):
    root = fill(tmp_path, *names)
    with pytest.raises(InputError) as caught:
        labels.list_training(LabelSource(root), 0.15)
    assert words.replace("ROOT", root) in str(caught.value)
    assert len(str(caught.value).replace(root, "")) < 400


def test_splits_are_found_on_s3(bucket, put):
    for name in [*splits("images/Training/training", "images/valid", "images/test"), "images/unlabelled/1.jpg"]:
        put(name, b"")
    root = f"s3://{bucket}/images"
    train, validation, message = list_with_message(root)
    assert set(map_classes(train, root)) == {"Training/training/cats/1.jpg", "Training/training/dogs/1.jpg"}
    assert set(map_classes(validation, root)) == {"valid/cats/1.jpg", "valid/dogs/1.jpg"}
    assert message.endswith(f"images in {root}/valid; not used: 'test', 'unlabelled'")


def test_evaluation_prefers_validation_and_says_so(tmp_path):
    root = fill(tmp_path, *splits("Train", "Valid", "TEST"))
    messages: list[object] = []
    labels.list_evaluation(LabelSource(root), None, messages.append)
    assert Message(f"2 images of 2 classes in {root}/Valid; not used: 'TEST'") in messages
    labels.list_evaluation(LabelSource(root), "test", messages.append)
    assert messages[-1] == Message(f"2 images of 2 classes in {root}/TEST")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (splits("Train"), "no validation/ or test/ under ROOT, only 'Train': name the folder with --split"),
        (["cats/1.jpg", "dogs/1.jpg", "test/1.jpg"], "ROOT: 'test' beside 'cats', 'dogs' may be a split or a class"),
    ],
)
def test_a_root_without_a_clear_split_is_not_evaluated(tmp_path, names, words):
    root = fill(tmp_path, *names)
    with pytest.raises(InputError) as caught:
        labels.list_evaluation(LabelSource(root), None)
    assert words.replace("ROOT", root) in str(caught.value)


@pytest.mark.parametrize("split_name", ["holdout", "holdout/", "Holdout"])
def test_a_named_split_may_have_any_name(tmp_path, split_name):
    root = fill(tmp_path, *splits("holdout", "test"), "cats/1.jpg")
    assert set(map_classes(labels.list_evaluation(LabelSource(root), split_name), root)) == {
        "holdout/cats/1.jpg",
        "holdout/dogs/1.jpg",
    }


# Class names


def test_unicode_forms_of_a_class_name_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "żółw é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for train_form, validation_form in ((composed, decomposed), (decomposed, composed)):
        root = fill(
            tmp_path / str(len(train_form)),
            *splits("train", classes=(train_form, "zebra")),
            *splits("val", classes=(validation_form, "zebra")),
        )
        train, validation, _ = labels.list_training(LabelSource(root), 0.15)
        assert train.class_names == validation.class_names == ("zebra", composed)
        assert sorted(map_classes(train, root).values()) == sorted(map_classes(validation, root).values())
    both = fill(tmp_path / "both", f"{composed}/1.jpg", f"{decomposed}/2.jpg", "zebra/1.jpg")
    assert sorted(map_classes(labels.list_evaluation(LabelSource(both), None), both).values()) == [
        "zebra",
        composed,
        composed,
    ]


def test_a_checkpoint_in_another_unicode_form_has_the_same_classes(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    root = fill(tmp_path, f"{composed}/1.jpg", "f/1.jpg")
    labelled = labels.list_evaluation(LabelSource(root), None)
    assert labelled.class_names == ("f", composed)
    labels.check_same_classes((decomposed, "f"), labelled.class_names, "the checkpoint", "data")
    reindexed = labels.reindex_labels(labelled, (decomposed, "f"))
    assert reindexed.class_names == (decomposed, "f")
    assert reindexed.files["true_index"].to_pylist() == [1 - i for i in labelled.files["true_index"].to_pylist()]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("cats", "c\u0430ts", "only in A: 'cats'; only in B: 'c\u0430ts' ('c\\u0430ts')"),
        ("cats", "cats ", "only in A: 'cats'; only in B: 'cats '"),
        ("cats", "Cats", "only in A: 'cats'; only in B: 'Cats'"),
        ("ﬁsh", "fish", "only in A: 'ﬁsh' ('\\ufb01sh'); only in B: 'fish'"),
        ("no\u200bise", "noise", "only in A: 'no\\u200bise'; only in B: 'noise'"),
    ],
)
def test_class_names_that_look_alike_are_spelled(first, second, words):
    with pytest.raises(InputError) as caught:
        labels.check_same_classes([first, "x"], [second, "x"], "A", "B")
    assert words in str(caught.value)


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
        labels.list_training(LabelSource(root), 0.15)
    assert words.replace("ROOT", root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_an_input_error(tmp_path):
    root = fill(tmp_path, "validation/a/1.jpg", "validation/b/1.jpg")
    with pytest.raises(InputError, match=f"no class folders under {root}/holdout; check --data-dir and --split"):
        labels.list_evaluation(LabelSource(root), "holdout")


def test_a_message_shows_only_the_first_class_names():
    with pytest.raises(InputError) as caught:
        labels.check_same_classes([f"c{i:03}" for i in range(1000)], ["x"], "the checkpoint", "data")
    assert "'c009' and 990 more" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_message_with_long_class_names_is_short():
    names = [f"{i}{'é' * 200}" for i in range(20)]
    with pytest.raises(InputError) as caught:
        labels.check_same_classes(names, ["x"], "the checkpoint", "data")
    assert " and 19 more; only in data: 'x'" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_order_of_class_names_does_not_matter():
    labels.check_same_classes(("b", "a"), ("a", "b"), "the checkpoint", "data")


# The split


def test_every_class_is_split_without_a_validation_folder(tmp_path):
    root = fill(tmp_path, *images("train/cats", 60), *images("train/dogs", 90))
    train, validation, _ = labels.list_training(LabelSource(root), 0.2)
    assert train.files.num_rows + validation.files.num_rows == 150
    assert not set(train.files["path"].to_pylist()) & set(validation.files["path"].to_pylist())
    for index, count in ((0, 60), (1, 90)):
        share = validation.files["true_index"].to_pylist().count(index) / count
        assert 0.08 < share < 0.35


def make_rows(counts: dict[str, int], group_size: int | None = None) -> list[LabelledRow]:
    """Name files of each class; with a group size, so many in a row are of one group."""
    names = [(label, i) for label, count in counts.items() for i in range(count)]
    return [
        LabelledRow(
            storage.Entry(f"/data/{label}/{i}.jpg"),
            label,
            f"{label}/{i}.jpg",
            group_size and f"{label}-{i // group_size}",
        )
        for label, i in names
    ]


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("group_size", [None, 4])
def test_each_class_is_split_near_the_fraction(fraction, group_size):
    counts = {"cats": 4000, "dogs": 1000, "mice": 400}
    train, validation = split_off(make_rows(counts, group_size), fraction)
    assert len(train) + len(validation) == sum(counts.values())
    for label, count in counts.items():
        share = sum(row.label == label for row in validation) / count
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / (count / (group_size or 1))) ** 0.5


@pytest.mark.parametrize("group_size", [None, 10])
def test_files_stay_in_their_split_when_others_are_added(group_size):
    train, validation = map(set, split_off(make_rows({"a": 100, "b": 120}, group_size), 0.15))
    train_then, validation_then = map(set, split_off(make_rows({"a": 900, "b": 121}, group_size), 0.15))
    assert train < train_then
    assert validation <= validation_then


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_no_split_is_empty(fraction, count):
    for rows in split_off(make_rows({"a": count, "b": count}), fraction):
        assert {row.label for row in rows} == {"a", "b"}


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_no_group_is_in_both_splits_even_where_it_has_several_classes(fraction):
    """Some classes are only in groups that have others, too, so that a class must not lose its last group."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            LabelledRow(storage.Entry(f"/{i}.jpg"), str(label), f"{i}.jpg", str(group))
            for i, (label, group) in enumerate(rng.integers((4, 9), size=(40, 2)))
        ]
        train, validation = split_off(rows, fraction)
        assert len(train) + len(validation) == 40
        assert not {row.group for row in train} & {row.group for row in validation}
        assert {row.label for row in train} == {row.label for row in validation} == {row.label for row in rows}


def test_a_class_in_one_group_cannot_be_split():
    rows = [*make_rows({"a": 3}, 3), *make_rows({"b": 3})]
    with pytest.raises(InputError, match="class 'a': its 3 images cannot be split without a group on both sides"):
        split_off(rows, 0.5)


def test_the_split_is_the_same_from_s3_a_local_folder_and_elsewhere(tmp_path, bucket, put):
    names = [*images("train/cats", 20), *images("train/dogs é %", 20)]
    local = fill(tmp_path / "data", *names)
    elsewhere = fill(tmp_path / "another place", *names)
    for name in names:
        put(f"prefix/{name}", b"")
    found = []
    for root in (local, elsewhere, f"s3://{bucket}/prefix"):
        train, validation, _ = labels.list_training(LabelSource(root), 0.3)
        found.append((map_classes(train, root), map_classes(validation, root)))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) + len(found[0][1]) == 40


def test_the_split_of_names_that_are_not_utf8_does_not_depend_on_the_root(tmp_path):
    found = []
    for place in ("data", "somewhere/else"):
        root = fill(tmp_path / place, *images("b", 50), "a/1.jpg")
        for i in range(50):
            with open(storage.local_path(root) + b"/a/\xff%d.jpg" % i, "wb"):
                pass
        validation = labels.list_training(LabelSource(root), 0.3).validation
        found.append([path.partition("/a/")[2] for path in validation.files["path"].to_pylist() if "/a/" in path])
    assert found[0] == found[1]
    assert 0 < len(found[0]) < 50
