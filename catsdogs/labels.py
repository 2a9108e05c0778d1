"""List labelled images: class names, the class index of each file, training and validation files.

Classes are the folders directly under a labelled root, in sorted order, without hidden ones.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.progress import Message, Progress, silent
from catsdogs.schema import LABELLED_FILES

VALIDATION_NAMES = ("validation", "val", "test")
EXTENSIONS_TEXT = " ".join(storage.EXTENSIONS)
MAX_NAMES_SHOWN = 10


@dataclass(frozen=True)
class LabelledFiles:
    """Files with their classes.

    Attributes:
        class_names: in index order.
        files: columns of `LABELLED_FILES`, sorted by path.
    """

    class_names: tuple[str, ...]
    files: pa.Table


@dataclass(frozen=True)
class _Root:
    """The listing of a root: every image file with its folders relative to the root."""

    uri: str
    entries: list[storage.Entry]
    parts: list[list[str]]
    folders: set[str]

    def read_split(self, folder: str) -> LabelledFiles:
        """Select the class folders of one split; with an empty name, those of the root itself."""
        depth = 1 if folder else 0
        below = [name.split("/") for name in self.folders if name.startswith(f"{folder}/" if folder else "")]
        class_names = sorted(parts[depth] for parts in below if len(parts) == depth + 1)
        index_by_name = {name: i for i, name in enumerate(class_names)}
        rows = [
            (entry, index_by_name[parts[depth]])
            for entry, parts in zip(self.entries, self.parts, strict=True)
            if len(parts) > depth and (not folder or parts[0] == folder)
        ]
        indices = [index for _, index in rows]
        _check_classes(storage.join(self.uri, folder) if folder else self.uri, class_names, indices)
        files = storage.build_files_table(entry for entry, _ in rows)
        files = files.append_column(LABELLED_FILES.field("true_index"), pa.array(indices, pa.int32()))
        return LabelledFiles(tuple(class_names), files.sort_by("path"))

    def has_classes(self, folder: str) -> bool:
        """Whether the root has such a folder with class folders in it."""
        return any(name.startswith(f"{folder}/") for name in self.folders)


def list_training(data_dir: str, val_split: float, progress: Progress = silent) -> tuple[LabelledFiles, LabelledFiles]:
    """List the training and validation files of a root.

    Raises:
        InputError: no class folders, an empty class, or different classes in the two splits.
    """
    root = _list_root(data_dir, progress)
    if not root.has_classes("train"):
        return split(root.read_split(""), val_split, data_dir)
    train = root.read_split("train")
    validation_name = next((name for name in VALIDATION_NAMES if root.has_classes(name)), None)
    if validation_name is None:
        return split(train, val_split, data_dir)
    validation = root.read_split(validation_name)
    check_same_classes(train.class_names, validation.class_names, "train", validation_name)
    return train, validation


def list_evaluation(data_dir: str, split_name: str | None, progress: Progress = silent) -> LabelledFiles:
    """List the files of a named split, else of validation, val or test, else of the class folders of the root.

    Raises:
        InputError: no such split, no class folders or an empty class.
    """
    root = _list_root(data_dir, progress)
    if split_name is not None and not root.has_classes(split_name):
        raise InputError(f"no class folders under {storage.join(data_dir, split_name)}; check --data-dir and --split")
    default = next((name for name in VALIDATION_NAMES if root.has_classes(name)), "")
    return root.read_split(default if split_name is None else split_name)


def split(labelled: LabelledFiles, fraction: float, root: str) -> tuple[LabelledFiles, LabelledFiles]:
    """Split every class by the hashes of its paths relative to the root.

    A file stays in its split when other files are added. Each split has at least one file of every class: if the
    hashes select none, the file with the nearest hash is moved.

    Raises:
        InputError: a class has only one image.
    """
    index_N = labelled.files["true_index"].to_numpy()
    is_validation_N = np.zeros(len(index_N), dtype=bool)
    relative = storage.Listing(root).relative
    position_N = np.array([_hash_position(relative(path)) for path in labelled.files["path"].to_pylist()])
    for i, name in enumerate(labelled.class_names):
        rows = np.flatnonzero(index_N == i)
        if len(rows) < 2:
            raise InputError(f"class {name!r} has only one image: expected at least 2 to split off a validation set")
        num_validation = min(max(1, int((position_N[rows] < fraction).sum())), len(rows) - 1)
        is_validation_N[rows[np.argsort(position_N[rows])][:num_validation]] = True
    train, validation = (labelled.files.filter(pa.array(mask)) for mask in (~is_validation_N, is_validation_N))
    return LabelledFiles(labelled.class_names, train), LabelledFiles(labelled.class_names, validation)


def check_same_classes(expected: Sequence[str], found: Sequence[str], expected_source: str, found_source: str) -> None:
    """Compare class names as sets.

    Raises:
        InputError: names that are on one side only.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise InputError(
            f"the classes differ: {expected_source} has {_format_names(expected)}, "
            f"{found_source} has {_format_names(found)}"
            + (f"; only in {expected_source}: {_format_names(missing)}" if missing else "")
            + (f"; only in {found_source}: {_format_names(extra)}" if extra else "")
        )


def reindex_labels(labelled: LabelledFiles, class_names: Sequence[str]) -> pa.Table:
    """Replace the class indices of files by those of a checkpoint that has the same classes in another order."""
    new_index_K = np.array([class_names.index(name) for name in labelled.class_names], dtype=np.int32)
    column = labelled.files.schema.get_field_index("true_index")
    index_N = pa.array(new_index_K[labelled.files["true_index"].to_numpy()])
    return labelled.files.set_column(column, LABELLED_FILES.field("true_index"), index_N)


def _format_names(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:MAX_NAMES_SHOWN]))
    return f"{shown} and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else shown or "none"


def _list_root(data_dir: str, progress: Progress) -> _Root:
    listing = storage.Listing(data_dir, progress)
    entries = list(listing)
    for folder, reason in listing.unlisted.items():
        progress(Message(f"could not list {folder}: {reason}"))
    if not entries:
        raise InputError(
            f"no images under {data_dir}: {listing.describe_other_files()}; "
            f"expected files such as {EXTENSIONS_TEXT}; check --data-dir"
        )
    parts = [listing.relative(entry.path).split("/")[:-1] for entry in entries]
    return _Root(data_dir, entries, parts, listing.folders)


def _check_classes(uri: str, class_names: list[str], indices: list[int]) -> None:
    if not class_names:
        raise InputError(
            f"no class folders under {uri}: expected one folder of images per class, such as cats/ and dogs/"
        )
    present = set(indices)
    empty = [name for i, name in enumerate(class_names) if i not in present]
    if empty:
        raise InputError(
            f"no images in class {_format_names(empty)} under {uri}: expected files such as {EXTENSIONS_TEXT}; "
            "fill or remove the folder"
        )
    if len(class_names) < 2:
        raise InputError(f"one class only, {class_names[0]!r}, under {uri}: expected two or more class folders")


def _hash_position(relative_path: str) -> float:
    """Map a path to a number in [0, 1), uniformly over paths."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:6]) / 2**48
