"""Labels from class folders: those directly under a labelled root or split, in sorted order, without hidden ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.labels.labelled_files import (
    AllRows,
    LabelledRow,
    Splits,
    check_same_classes,
    list_classes,
    normalize_name,
)
from catsdogs.labels.path_table import Exclusion
from catsdogs.labels.split_folders import (
    FolderTree,
    build_tree,
    find_all_folders,
    find_evaluation_folder,
    find_named_split,
    find_training_folders,
)
from catsdogs.progress import Message, Progress
from catsdogs.text import format_names

EXTENSIONS_TEXT = " ".join(storage.EXTENSIONS)


@dataclass(frozen=True)
class _Root:
    """The listing of a root: every image file with the parts of its path relative to the root."""

    entries: list[storage.Entry]
    parts: list[list[str]]
    tree: FolderTree

    def join(self, folder: str) -> str:
        """Return the URI of a folder below the root; "" is the root."""
        return storage.join(self.tree.uri, *folder.split("/")) if folder else self.tree.uri

    def count_loose(self, *folders: str | None) -> int:
        """Count the images that lie in the given folders or above them, in no class folder."""
        above = [folder.split("/") if folder else [] for folder in folders if folder is not None]
        return sum(any(parts[:-1] == names[: len(parts) - 1] for names in above) for parts in self.parts)

    def select(self, folder: str) -> list[LabelledRow]:
        """Select the files in the class folders of a folder."""
        above = folder.split("/") if folder else []
        return [
            LabelledRow(entry, normalize_name(parts[len(above)]), "/".join(parts))
            for entry, parts in zip(self.entries, self.parts, strict=True)
            if len(parts) > len(above) + 1 and parts[: len(above)] == above
        ]

    def list_class_names(self, folder: str) -> list[str]:
        """List the names of the class folders of a folder."""
        return sorted({normalize_name(name) for name in self.tree.children.get(folder, [])})

    def read(self, folder: str) -> list[LabelledRow]:
        """Select the files in the class folders of a folder, which must be two or more, with files each."""
        rows = self.select(folder)
        _check_classes(self.join(folder), self.list_class_names(folder), rows)
        return rows


def read_training_folders(data_dir: str, exclusion: Exclusion, progress: Progress) -> Splits:
    """Read the training and the validation folder of a root.

    Raises:
        InputError: no class folders, an empty class, different classes in the two splits, or a folder that may be a
            split or a class.
    """
    root = _list_root(data_dir, exclusion, progress)
    folders = find_training_folders(root.tree)
    train, validation = root.read(folders.train), None
    if folders.validation is not None:
        validation = root.read(folders.validation)
        check_same_classes(list_classes(train), list_classes(validation), folders.train, folders.validation)
    return Splits(
        train,
        validation,
        root.join(folders.train),
        f"in {root.join(folders.validation or '')}",
        _describe_unused(folders.unused, root.count_loose(folders.train, folders.validation)),
    )


def read_evaluation_folder(
    data_dir: str, split_name: str | None, exclusion: Exclusion, progress: Progress
) -> list[LabelledRow]:
    """Read a named split, else the validation or test folder, else the class folders of the root.

    Raises:
        InputError: no such split, no class folders, an empty class, or a folder that may be a split or a class.
    """
    root = _list_root(data_dir, exclusion, progress)
    if split_name is None:
        folder, unused = find_evaluation_folder(root.tree)
    else:
        named = find_named_split(root.tree, split_name)
        if named is None:
            uri = storage.join(data_dir, split_name)
            raise InputError(f"no class folders under {uri}; check --data-dir and --split")
        folder, unused = named, []
    rows = root.read(folder)
    text = f"{len(rows):,} images of {len(list_classes(rows))} classes in {root.join(folder)}"
    progress(Message(text + _describe_unused(unused, root.count_loose(folder))))
    return rows


def read_all_folders(data_dir: str, exclusion: Exclusion, progress: Progress) -> AllRows:
    """Read every split of a root, or its class folders; one class or an empty one is not refused.

    Raises:
        InputError: no class folders, or a folder that may be a split or a class.
    """
    root = _list_root(data_dir, exclusion, progress)
    folders = find_all_folders(root.tree)
    rows = {split: root.select(folder) for split, folder in folders.items()}
    if not any(rows.values()):
        raise InputError(
            f"no class folders under {data_dir}: expected one folder of images per class, such as cats/ and dogs/; "
            "for images without labels, use --input"
        )
    used = {folder.split("/")[0] for folder in folders.values()}
    unused = [] if "" in folders else sorted(set(root.tree.with_images) - used)
    class_names = {split: root.list_class_names(folder) for split, folder in folders.items()}
    return AllRows(rows, class_names, _describe_unused(unused, root.count_loose(*folders.values())))


def _describe_unused(folders: list[str], num_loose: int) -> str:
    unused = [format_names(folders)] if folders else []
    unused += [f"{num_loose:,} images beside the class folders"] if num_loose else []
    return f"; not used: {', '.join(unused)}" if unused else ""


def _list_root(data_dir: str, exclusion: Exclusion, progress: Progress) -> _Root:
    listing = storage.Listing(data_dir, progress)
    entries = list(listing)
    for folder, reason in listing.unlisted.items():
        progress(Message(f"could not list {folder}: {reason}"))
    if not entries:
        raise InputError(
            f"no images under {data_dir}: {listing.describe_other_files()}; "
            f"expected files such as {EXTENSIONS_TEXT}; check --data-dir"
        )
    kept = exclusion.filter(entries, progress)
    parts = [listing.relative(entry.path).split("/") for entry in kept]
    with_images = {names[0] for names in parts if len(names) > 1}
    return _Root(kept, parts, build_tree(data_dir, listing.folders, with_images))


def _check_classes(uri: str, class_names: list[str], rows: Sequence[LabelledRow]) -> None:
    if not class_names:
        raise InputError(
            f"no class folders under {uri}: expected one folder of images per class, such as cats/ and dogs/"
        )
    present = {row.label for row in rows}
    if empty := [name for name in class_names if name not in present]:
        raise InputError(
            f"no images in class {format_names(empty)} under {uri}: expected files such as {EXTENSIONS_TEXT}; "
            "fill or remove the folder"
        )
    if len(class_names) < 2:
        raise InputError(f"one class only, {class_names[0]!r}, under {uri}: expected two or more class folders")
