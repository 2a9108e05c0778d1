"""Files with class indices; class names.

Class names are in Unicode's form NFC: macOS writes `é` as two characters (NFD), other systems as one.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.schema import LABELLED_FILES
from catsdogs.text import format_names


@dataclass(frozen=True)
class LabelledFiles:
    """Files with their classes.

    Attributes:
        class_names: in index order.
        files: columns of `LABELLED_FILES`, sorted by path.
        groups: of each file, null for a separate group; None if no file has one.
    """

    class_names: tuple[str, ...]
    files: pa.Table
    groups: pa.ChunkedArray | None = None


class LabelledRow(NamedTuple):
    """A file with the name of its class.

    Attributes:
        relative: the path relative to the folder of all, by which files are split.
        group: images of one group are never on both sides of a split; None is a separate group.
    """

    entry: storage.Entry
    label: str
    relative: str
    group: str | None = None


class Splits(NamedTuple):
    """Rows for training and validation; `validation` is None if it has to be split off.

    Attributes:
        train_place, validation_place: where the rows were found, for messages; `validation_place` may be empty.
        unused: what else there is, for messages.
    """

    train: list[LabelledRow]
    validation: list[LabelledRow] | None
    train_place: str
    validation_place: str = ""
    unused: str = ""


class AllRows(NamedTuple):
    """The rows of every split.

    Attributes:
        rows: by split, TRAIN, VALIDATION or TEST; all under "" if there are no splits.
        class_names: of each split, also those without rows.
        unused: what else there is, for messages.
    """

    rows: dict[str, list[LabelledRow]]
    class_names: dict[str, list[str]]
    unused: str = ""


def list_classes(rows: Sequence[LabelledRow]) -> list[str]:
    """List the labels of files, sorted."""
    return sorted({row.label for row in rows})


def build_labelled_files(rows: Sequence[LabelledRow]) -> LabelledFiles:
    """Build the table of files, with the classes that they have."""
    class_names = list_classes(rows)
    index_by_name = {name: i for i, name in enumerate(class_names)}
    files = storage.build_files_table(row.entry for row in rows)
    indices = pa.array([index_by_name[row.label] for row in rows], pa.int32())
    files = files.append_column(LABELLED_FILES.field("true_index"), indices)
    groups = pa.array([row.group for row in rows], pa.string())
    files = files.append_column("group", groups).sort_by("path")
    has_groups = groups.null_count < len(groups)
    return LabelledFiles(tuple(class_names), files.select(LABELLED_FILES.names), files["group"] if has_groups else None)


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
    return replace(labelled, class_names=tuple(class_names), files=files)
