"""List labelled images: class names, the class index of each file, training and validation files.

Classes are the folders directly under a labelled root or split, in sorted order, without hidden ones. Their names are
in Unicode's form NFC: macOS writes `é` as two characters (NFD), other systems as one.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.progress import Message, Progress, silent
from catsdogs.schema import LABELLED_FILES
from catsdogs.split_folders import (
    FolderTree,
    build_tree,
    find_evaluation_folder,
    find_named_split,
    find_training_folders,
)
from catsdogs.text import format_names

EXTENSIONS_TEXT = " ".join(storage.EXTENSIONS)


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

    entries: list[storage.Entry]
    parts: list[list[str]]
    tree: FolderTree

    def join(self, folder: str) -> str:
        """Return the URI of a folder below the root; "" is the root."""
        return storage.join(self.tree.uri, *folder.split("/")) if folder else self.tree.uri

    def count_loose(self, *folders: str | None) -> int:
        """Count the images that lie in the given folders or above them, in no class folder."""
        above = [folder.split("/") if folder else [] for folder in folders if folder is not None]
        return sum(any(parts == names[: len(parts)] for names in above) for parts in self.parts)

    def read(self, folder: str) -> LabelledFiles:
        """Select the class folders of a folder."""
        above = folder.split("/") if folder else []
        class_names = sorted({normalize_name(name) for name in self.tree.children.get(folder, [])})
        index_by_name = {name: i for i, name in enumerate(class_names)}
        rows = [
            (entry, index_by_name[normalize_name(parts[len(above)])])
            for entry, parts in zip(self.entries, self.parts, strict=True)
            if len(parts) > len(above) and parts[: len(above)] == above
        ]
        indices = [index for _, index in rows]
        _check_classes(self.join(folder), class_names, indices)
        files = storage.build_files_table(entry for entry, _ in rows)
        files = files.append_column(LABELLED_FILES.field("true_index"), pa.array(indices, pa.int32()))
        return LabelledFiles(tuple(class_names), files.sort_by("path"))


def list_training(data_dir: str, val_split: float, progress: Progress = silent) -> tuple[LabelledFiles, LabelledFiles]:
    """List the training and validation files of a root; the first message names the classes and both folders.

    Raises:
        InputError: no class folders, an empty class, different classes in the two splits, or a folder that may be a
            split or a class.
    """
    root = _list_root(data_dir, progress)
    folders = find_training_folders(root.tree)
    listed = root.read(folders.train)
    if folders.validation is None:
        train, validation = split(listed, val_split, data_dir)
        source = f"held out of the same folder (--val-split {val_split:g})"
    else:
        train, validation = listed, root.read(folders.validation)
        check_same_classes(train.class_names, validation.class_names, folders.train, folders.validation)
        source = f"in {root.join(folders.validation)}"
    progress(
        Message(
            f"{len(train.class_names)} classes, {format_names(train.class_names)}: {train.files.num_rows:,} training "
            f"images in {root.join(folders.train)}, {validation.files.num_rows:,} validation images {source}"
            + _describe_unused(folders.unused, root.count_loose(folders.train, folders.validation))
        )
    )
    return train, validation


def list_evaluation(data_dir: str, split_name: str | None, progress: Progress = silent) -> LabelledFiles:
    """List the files of a named split, else of the validation or test folder, else of the class folders of the root.

    Raises:
        InputError: no such split, no class folders, an empty class, or a folder that may be a split or a class.
    """
    root = _list_root(data_dir, progress)
    if split_name is None:
        folder, unused = find_evaluation_folder(root.tree)
    else:
        named = find_named_split(root.tree, split_name)
        if named is None:
            uri = storage.join(data_dir, split_name)
            raise InputError(f"no class folders under {uri}; check --data-dir and --split")
        folder, unused = named, []
    labelled = root.read(folder)
    text = f"{labelled.files.num_rows:,} images of {len(labelled.class_names)} classes in {root.join(folder)}"
    progress(Message(text + _describe_unused(unused, root.count_loose(folder))))
    return labelled


def _describe_unused(folders: list[str], num_loose: int) -> str:
    unused = [format_names(folders)] if folders else []
    unused += [f"{num_loose:,} images beside the class folders"] if num_loose else []
    return f"; not used: {', '.join(unused)}" if unused else ""


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


def normalize_name(name: str) -> str:
    """Return a class name in Unicode's form NFC; two spellings of one name become equal."""
    return unicodedata.normalize("NFC", name)


def check_same_classes(expected: Sequence[str], found: Sequence[str], expected_source: str, found_source: str) -> None:
    """Compare class names as sets, in NFC.

    Raises:
        InputError: names that are on one side only.
    """
    expected_set, found_set = set(map(normalize_name, expected)), set(map(normalize_name, found))
    missing, extra = sorted(expected_set - found_set), sorted(found_set - expected_set)
    if missing or extra:
        with_escapes = bool(missing and extra)
        raise InputError(
            f"the classes differ: {expected_source} has {format_names(expected)}, "
            f"{found_source} has {format_names(found)}"
            + (f"; only in {expected_source}: {format_names(missing, with_escapes)}" if missing else "")
            + (f"; only in {found_source}: {format_names(extra, with_escapes)}" if extra else "")
        )


def reindex_labels(labelled: LabelledFiles, class_names: Sequence[str]) -> LabelledFiles:
    """Replace the class indices of files by those of a checkpoint that has the same classes in another order."""
    index_by_name = {normalize_name(name): i for i, name in enumerate(class_names)}
    new_index_K = np.array([index_by_name[name] for name in labelled.class_names], dtype=np.int32)
    column = labelled.files.schema.get_field_index("true_index")
    index_N = pa.array(new_index_K[labelled.files["true_index"].to_numpy()])
    files = labelled.files.set_column(column, LABELLED_FILES.field("true_index"), index_N)
    return LabelledFiles(tuple(class_names), files)


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
    with_images = {folders[0] for folders in parts if folders}
    return _Root(entries, parts, build_tree(data_dir, listing.folders, with_images))


def _check_classes(uri: str, class_names: list[str], indices: list[int]) -> None:
    if not class_names:
        raise InputError(
            f"no class folders under {uri}: expected one folder of images per class, such as cats/ and dogs/"
        )
    present = set(indices)
    empty = [name for i, name in enumerate(class_names) if i not in present]
    if empty:
        raise InputError(
            f"no images in class {format_names(empty)} under {uri}: expected files such as {EXTENSIONS_TEXT}; "
            "fill or remove the folder"
        )
    if len(class_names) < 2:
        raise InputError(f"one class only, {class_names[0]!r}, under {uri}: expected two or more class folders")


def _hash_position(relative_path: str) -> float:
    """Map a path to a number in [0, 1), uniformly over paths."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:6]) / 2**48
