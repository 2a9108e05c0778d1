"""Class names, path -> label, the split into training and validation rows.

Classes are the folders directly under a labelled root, in plain sorted order; hidden ones are none.
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
EXTENSIONS_SHOWN = " ".join(storage.EXTENSIONS)


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
    """One pass over a root: every listed file with its folders relative to the root."""

    uri: str
    entries: list[storage.Entry]
    parts: list[list[str]]
    folders: set[str]

    def under(self, folder: str) -> LabelledFiles:
        """Take the class folders of one split; an empty name for the root itself."""
        depth = folder.count("/") + 1 if folder else 0
        class_names = sorted(
            name.rpartition("/")[2]
            for name in self.folders
            if name.count("/") == depth and (not folder or name.startswith(f"{folder}/"))
        )
        where = storage.join(self.uri, folder) if folder else self.uri
        index = {name: i for i, name in enumerate(class_names)}
        rows = [
            (entry, index[parts[depth]])
            for entry, parts in zip(self.entries, self.parts, strict=True)
            if len(parts) > depth and (not folder or parts[0] == folder)
        ]
        _check_classes(where, class_names, rows)
        return LabelledFiles(tuple(class_names), _table(rows))

    def has(self, folder: str) -> bool:
        """Whether the root has such a folder with class folders in it."""
        return any(name.startswith(f"{folder}/") for name in self.folders)


def list_training(data_dir: str, val_split: float, progress: Progress = silent) -> tuple[LabelledFiles, LabelledFiles]:
    """List a root's training and validation rows.

    Raises:
        InputError: no class folders, an empty class, or classes that differ between the two.
    """
    root = _list(data_dir, progress)
    train = root.under("train" if root.has("train") else "")
    if root.has("train"):
        validation_name = next((name for name in VALIDATION_NAMES if root.has(name)), None)
        if validation_name is not None:
            validation = root.under(validation_name)
            check_same_classes(train.class_names, validation.class_names, "train", validation_name)
            return train, validation
    return split(train, val_split, data_dir)


def list_evaluation(data_dir: str, split_name: str | None, progress: Progress = silent) -> LabelledFiles:
    """List the rows to evaluate on: a named split, else validation, val or test, else class folders directly.

    Raises:
        InputError: no such split, no class folders or an empty class.
    """
    root = _list(data_dir, progress)
    if split_name is not None and not root.has(split_name):
        raise InputError(f"no class folders under {storage.join(data_dir, split_name)}; check --data-dir and --split")
    first = next((name for name in VALIDATION_NAMES if root.has(name)), "")
    return root.under(split_name if split_name is not None else first)


def split(labelled: LabelledFiles, fraction: float, root: str) -> tuple[LabelledFiles, LabelledFiles]:
    """Split every class by the hashes of its paths below the root: a file stays on its side when others come.

    Each side has at least one file of every class; to that end alone the nearest hash changes sides.

    Raises:
        InputError: a class has one image only.
    """
    index = labelled.files["true_index"].to_numpy()
    chosen = np.zeros(len(index), dtype=bool)
    relative = storage.Listing(root).relative
    position = np.array([_position(relative(path)) for path in labelled.files["path"].to_pylist()])
    for i, name in enumerate(labelled.class_names):
        rows = np.flatnonzero(index == i)
        if len(rows) < 2:
            raise InputError(f"class {name!r} has one image only: expected at least 2 to split off a validation set")
        num_chosen = min(max(1, int((position[rows] < fraction).sum())), len(rows) - 1)
        chosen[rows[np.argsort(position[rows])][:num_chosen]] = True
    train, validation = (labelled.files.filter(pa.array(mask)) for mask in (~chosen, chosen))
    return LabelledFiles(labelled.class_names, train), LabelledFiles(labelled.class_names, validation)


def check_same_classes(expected: Sequence[str], found: Sequence[str], expected_of: str, found_of: str) -> None:
    """Compare class names as sets.

    Raises:
        InputError: with the names on one side only.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise InputError(
            f"the classes differ: {expected_of} has {_names(expected)}, {found_of} has {_names(found)}"
            + (f"; only in {expected_of}: {_names(missing)}" if missing else "")
            + (f"; only in {found_of}: {_names(extra)}" if extra else "")
        )


def reindex_labels(labelled: LabelledFiles, class_names: Sequence[str]) -> pa.Table:
    """Give files the class indices of a checkpoint, whose classes are the same by name."""
    position = np.array([class_names.index(name) for name in labelled.class_names], dtype=np.int32)
    column = labelled.files.schema.get_field_index("true_index")
    index = pa.array(position[labelled.files["true_index"].to_numpy()])
    return labelled.files.set_column(column, LABELLED_FILES.field("true_index"), index)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown or "none"


def _list(data_dir: str, progress: Progress) -> _Root:
    listing = storage.Listing(data_dir, progress)
    entries = list(listing)
    for folder, reason in listing.unlisted.items():
        progress(Message(f"could not list {folder}: {reason}"))
    if not entries:
        raise InputError(f"no images under {data_dir}: looked for {EXTENSIONS_SHOWN}; check --data-dir")
    parts = [listing.relative(entry.path).split("/")[:-1] for entry in entries]
    return _Root(data_dir, entries, parts, listing.folders)


def _check_classes(where: str, class_names: list[str], rows: list[tuple[storage.Entry, int]]) -> None:
    if not class_names:
        raise InputError(
            f"no class folders under {where}: expected one folder of images per class, such as cats/ and dogs/"
        )
    filled = {index for _, index in rows}
    empty = [name for i, name in enumerate(class_names) if i not in filled]
    if empty:
        raise InputError(
            f"no images in class {_names(empty)} under {where}: looked for {EXTENSIONS_SHOWN}; "
            "fill or remove the folder"
        )
    if len(class_names) < 2:
        raise InputError(f"one class only, {class_names[0]!r}, under {where}: expected two or more class folders")


def _table(rows: list[tuple[storage.Entry, int]]) -> pa.Table:
    entries = [entry for entry, _ in rows]
    columns = [[e.path for e in entries], [e.size_bytes for e in entries], [e.version for e in entries]]
    table = pa.table([*columns, [index for _, index in rows]], schema=LABELLED_FILES)
    return table.sort_by("path")


def _position(relative_path: str) -> float:
    """Place a path in [0, 1), evenly over all paths."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:6]) / 2**48
