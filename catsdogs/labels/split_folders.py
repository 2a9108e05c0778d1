"""Find which folders of a root are splits and which are classes.

A split is a folder with one of the `SPELLINGS` that contains class folders, perhaps inside a single folder of its own
name: `train/cats/1.jpg` or `train/train/cats/1.jpg`. A folder that may be a split or a class is an InputError.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from catsdogs.errors import InputError
from catsdogs.text import format_names

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPELLINGS = {  # in any case; in the order of preference
    TRAIN: ("train", "training", "training_set", "seg_train"),
    VALIDATION: ("validation", "val", "valid", "dev"),
    TEST: ("test", "test_set", "testing", "seg_test"),
}
ROLES = {spelling: role for role, spellings in SPELLINGS.items() for spelling in spellings}
# Words in names such as `train_images` and `test1`. If all folders have one, they are splits.
SPLIT_WORDS = ROLES | {
    **dict.fromkeys(("trainset", "trainval"), TRAIN),
    **dict.fromkeys(("valset", "devset", "eval", "evaluation", "holdout"), VALIDATION),
    **dict.fromkeys(("testset", "tests"), TEST),
}
EXPECTED = "expected train/ and validation/ (or test/) with the class folders in them, or class folders alone"


@dataclass(frozen=True)
class FolderTree:
    """The folders of a root.

    Attributes:
        children: sorted names of the folders in a folder, by its path below the root; "" is the root.
        with_images: names of the folders in the root that have images in them or below.
    """

    uri: str
    children: dict[str, list[str]]
    with_images: Collection[str]


class TrainingFolders(NamedTuple):
    """Folders below a root; "" is the root. `validation` is None if there is none; `unused` have images, too."""

    train: str
    validation: str | None
    unused: list[str]


class EvaluationFolder(NamedTuple):
    """A folder below a root; "" is the root. `unused` are the splits that it was preferred to."""

    folder: str
    unused: list[str]


def build_tree(uri: str, folders: Iterable[str], with_images: Collection[str]) -> FolderTree:
    """Build a tree from the paths of all folders below a root."""
    children = defaultdict(list)
    for path in sorted(folders):
        parent, _, name = path.rpartition("/")
        children[parent].append(name)
    return FolderTree(uri, dict(children), with_images)


def find_training_folders(tree: FolderTree) -> TrainingFolders:
    """Find the training and the validation split of a root, or that its folders are classes.

    Raises:
        InputError: a folder may be a split or a class, or there is no training split, or more than one.
    """
    splits, others = _find_splits(tree), _list_others(tree)
    if not splits:
        _check_class_folders(tree)
        return TrainingFolders("", None, [])
    train, validation = _choose(tree, splits, TRAIN), _choose(tree, splits, VALIDATION, TEST)
    if others and (train is None or validation is None):
        raise _ambiguous(tree.uri, splits, others)
    if train is None:
        raise InputError(f"no train/ under {tree.uri}, only {format_names(splits)}: {EXPECTED}")
    unused = [name for name in tree.children[""] if name in tree.with_images and name not in (train, validation)]
    return TrainingFolders(_enter(tree, train), validation and _enter(tree, validation), unused)


def find_evaluation_folder(tree: FolderTree) -> EvaluationFolder:
    """Find the split of a root to evaluate on, or that its folders are classes.

    Raises:
        InputError: a folder may be a split or a class, or there is only a training split.
    """
    splits = _find_splits(tree)
    if not splits:
        _check_class_folders(tree)
        return EvaluationFolder("", [])
    chosen = _choose(tree, splits, VALIDATION, TEST)
    if chosen is None:
        raise InputError(
            f"no validation/ or test/ under {tree.uri}, only {format_names(splits)}: name the folder with --split"
        )
    unused = [name for name in splits if name != chosen and _role(name) != TRAIN]
    return EvaluationFolder(_enter(tree, chosen), unused)


def find_all_folders(tree: FolderTree) -> dict[str, str]:
    """Find the folder of every split of a root, by TRAIN, VALIDATION and TEST; {"": ""} if its folders are classes.

    Raises:
        InputError: a folder may be a split or a class, or there is more than one training split.
    """
    splits, others = _find_splits(tree), _list_others(tree)
    if not splits:
        _check_class_folders(tree)
        return {"": ""}
    chosen = {role: name for role in SPELLINGS if (name := _choose(tree, splits, role)) is not None}
    if others and (TRAIN not in chosen or len(chosen) == 1):
        raise _ambiguous(tree.uri, splits, others)
    return {role: _enter(tree, name) for role, name in chosen.items()}


def find_named_split(tree: FolderTree, name: str) -> str | None:
    """Find a folder with class folders by its name, in any case if no other has exactly this name; None if absent."""
    path = name.strip("/")
    same = [child for child in tree.children.get("", []) if _fold(child) == _fold(path) and tree.children.get(child)]
    if tree.children.get(path):
        return _enter(tree, path)
    return _enter(tree, same[0]) if path and len(same) == 1 else None


def _fold(name: str) -> str:
    return name.strip().casefold()


def _role(name: str) -> str:
    """Return which split a name stands for; a name of none stands for itself."""
    return ROLES.get(_fold(name), _fold(name))


def _find_split_word(name: str) -> str | None:
    """Find which split a name stands for by one of its words; None if by none."""
    return next((SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", _fold(name)) if word in SPLIT_WORDS), None)


def _is_spelling(name: str) -> bool:
    return _fold(name) in ROLES


def _list_others(tree: FolderTree) -> list[str]:
    """List the folders with images whose names are not those of splits."""
    return [name for name in tree.children.get("", []) if name in tree.with_images and not _is_spelling(name)]


def _find_splits(tree: FolderTree) -> list[str]:
    """Find the folders with a split's name and class folders; without them, all with a split's name if no other is."""
    named = [name for name in tree.children.get("", []) if _is_spelling(name)]
    splits = [name for name in named if tree.children.get(name)]
    return splits or ([] if _list_others(tree) else [name for name in named if name in tree.with_images])


def _choose(tree: FolderTree, splits: list[str], *roles: str) -> str | None:
    """Choose the split with the preferred spelling."""
    order = list(ROLES)
    found = sorted((name for name in splits if _role(name) in roles), key=lambda name: order.index(_fold(name)))
    if len(found) > 1 and (roles == (TRAIN,) or _fold(found[0]) == _fold(found[1])):
        raise InputError(f"{tree.uri} has {format_names(found)}: expected one of them; remove or rename the others")
    return found[0] if found else None


def _enter(tree: FolderTree, split: str) -> str:
    """Return the folder of a split that has the class folders: the split, or the folder of its own name in it."""
    children = tree.children.get(split, [])
    name = split.rpartition("/")[2]
    same = [child for child in children if _role(child) == _role(name) and tree.children.get(f"{split}/{child}")]
    if same and len(children) > 1:
        raise _ambiguous(f"{tree.uri}/{split}", same, [child for child in children if child not in same])
    return f"{split}/{same[0]}" if same else split


def _check_class_folders(tree: FolderTree) -> None:
    """Check that no folder of a root with class folders looks like a split; `train` may be a class (of vehicles)."""
    others = _list_others(tree)
    unclear = [name for name in tree.with_images if _is_spelling(name) and _role(name) != TRAIN]
    if unclear:
        raise _ambiguous(tree.uri, sorted(unclear), others)
    for name in others:
        splits = [child for child in tree.children.get(name, []) if _is_spelling(child)]
        roles = set(map(_role, splits))
        if TRAIN in roles and len(roles) > 1:
            raise InputError(
                f"{tree.uri}/{name} contains {format_names(splits)}: expected train/ and validation/ directly under "
                "--data-dir, with the class folders in them"
            )
    _check_other_spellings(tree, others)


def _check_other_spellings(tree: FolderTree, names: list[str]) -> None:
    """Refuse folders that are splits by their words, or that contain the same folders as another split would."""
    roles = {_find_split_word(name) for name in tree.with_images}
    if None not in roles and TRAIN in roles and len(roles) > 1:
        raise InputError(
            f"{tree.uri}: {format_names(sorted(tree.with_images))} look like splits: rename them to train and "
            "validation"
        )
    for train in (name for name in names if "train" in _fold(name) and tree.children.get(name)):
        for other in (name for name in names if "val" in _fold(name) or "test" in _fold(name)):
            if other != train and tree.children.get(other) == tree.children[train]:
                raise InputError(
                    f"{tree.uri}: {train!r} and {other!r} contain the same folders, as splits do: rename them to "
                    "train and validation"
                )


def _ambiguous(uri: str, splits: list[str], classes: list[str]) -> InputError:
    return InputError(
        f"{uri}: {format_names(splits)} beside {format_names(classes)} may be a split or a class: {EXPECTED}; "
        "move it or rename it"
    )
