"""Groups of images, such as the frames of a video: a group is never on both sides of a split."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from catsdogs.errors import InputError
from catsdogs.labels.labelled_files import LabelledRow, list_classes
from catsdogs.text import format_names

IndexArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def add_groups(rows: Iterable[LabelledRow], pattern: str) -> list[LabelledRow]:
    """Set each row's group to the first capture of a regular expression in its relative path; without one, to None."""
    compiled = re.compile(pattern)
    return [row._replace(group=match[1] if (match := compiled.search(row.relative)) else None) for row in rows]


def check_groups(train: Sequence[LabelledRow], validation: Sequence[LabelledRow]) -> None:
    """Check that no group is in both splits; InputError names those that are."""
    groups = [{row.group for row in rows if row.group is not None} for rows in (train, validation)]
    if both := sorted(groups[0] & groups[1]):
        paths = [next(row.entry.path for row in rows if row.group == both[0]) for rows in (train, validation)]
        raise InputError(
            f"expected each group in one split only, found {format_names(both)} in both, such as {paths[0]} for "
            f"training and {paths[1]} for validation; move the images, leave them out with --exclude, or give no splits"
        )


def split_off(rows: Sequence[LabelledRow], fraction: float) -> tuple[list[LabelledRow], list[LabelledRow]]:
    """Split by the hashes of the groups; a file without a group is split by the hash of its relative path.

    A group stays in its split when others are added. Each split has at least one file of every class: if the hashes
    select none, the group with the nearest hash is moved.

    Raises:
        InputError: a class cannot be in both splits.
    """
    keys = [("path", row.relative) if row.group is None else ("group", row.group) for row in rows]
    index_by_key = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    position_G = np.array([_hash_position(name) for _, name in index_by_key])
    class_names = list_classes(rows)
    index_by_name = {name: i for i, name in enumerate(class_names)}
    sides = _Sides(
        np.array([index_by_key[key] for key in keys]),
        np.array([index_by_name[row.label] for row in rows]),
        position_G < fraction,
    )
    order_G = np.argsort(position_G, kind="stable")
    for i, name in enumerate(class_names):
        if not (sides.fill(i, 1, order_G) and sides.fill(i, 0, order_G[::-1])):
            _raise_unsplit(name, [row for row in rows if row.label == name])
    is_validation_N = sides.is_validation_G[sides.group_N]
    pairs = list(zip(rows, is_validation_N, strict=True))
    return [row for row, selected in pairs if not selected], [row for row, selected in pairs if selected]


class _Sides:
    """The side of each group. Shapes: N rows, G groups, K classes; the sides are 0, training, and 1, validation."""

    def __init__(self, group_N: IndexArray, class_N: IndexArray, is_validation_G: BoolArray) -> None:
        self.group_N = group_N
        self.is_validation_G = is_validation_G
        self._class_N = class_N
        self._num_classes = int(class_N.max()) + 1
        self._num_2K = [self._count(is_validation_G[group_N] == side) for side in (False, True)]

    def _count(self, rows_N: BoolArray) -> IndexArray:
        return np.bincount(self._class_N[rows_N], minlength=self._num_classes)

    def fill(self, class_index: int, side: int, order_G: IndexArray) -> bool:
        """Give a side a group of a class if it has none, and leave the other side some of each class.

        Args:
            order_G: the groups, the preferred first.

        Returns:
            Whether the side has files of the class.
        """
        if self._num_2K[side][class_index]:
            return True
        with_class = set(self.group_N[self._class_N == class_index].tolist())
        for group in (group for group in order_G.tolist() if group in with_class):
            moved_K = self._count(self.group_N == group)
            if np.all((moved_K == 0) | (moved_K < self._num_2K[1 - side])):
                self.is_validation_G[group] = bool(side)
                self._num_2K[side] += moved_K
                self._num_2K[1 - side] -= moved_K
                return True
        return False


def _raise_unsplit(name: str, rows: Sequence[LabelledRow]) -> None:
    if len(rows) < 2:
        raise InputError(f"class {name!r} has only one image: expected at least 2 to split off a validation set")
    raise InputError(
        f"class {name!r}: its {len(rows):,} images cannot be split without a group on both sides; "
        "expected at least 2 groups that have images of it"
    )


def _hash_position(name: str) -> float:
    """Map a name to a number in [0, 1), uniformly over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48
