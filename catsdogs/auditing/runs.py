"""Runs of equal keys among images, and the pairs within each.

Shapes: N items, R runs.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]


class Bucket(NamedTuple):
    """Images that are too many to be paired, and the row of one of them."""

    kind: str
    num_images: int
    row: int


class Runs:
    """Items sorted by key; the items with one key are a run.

    Args:
        num_N: images that each item stands for.
        max_paired: images of a run whose items are paired.
    """

    def __init__(self, key_N: IndexArray | HashArray, num_N: IndexArray, max_paired: int) -> None:
        self._order_N = np.argsort(key_N)
        sorted_N = key_N[self._order_N]
        is_start_N = np.ones(len(key_N), np.bool_)
        is_start_N[1:] = sorted_N[1:] != sorted_N[:-1]
        self._start_R = np.flatnonzero(is_start_N)
        self._length_R = np.diff(self._start_R, append=len(key_N))
        self._images_R = np.add.reduceat(num_N[self._order_N], self._start_R) if len(key_N) else self._length_R
        self._is_paired_R = self._images_R <= max_paired

    def list_unpaired(self, kind: str) -> list[Bucket]:
        """List the runs of several items with more than `max_paired` images; `row` is the first item of each."""
        runs = np.flatnonzero(~self._is_paired_R & (self._length_R > 1))
        first = self._order_N[self._start_R[runs]].tolist()
        return [Bucket(kind, *found) for found in zip(self._images_R[runs].tolist(), first, strict=True)]

    def count_pairs(self) -> int:
        """Count the pairs of items of the other runs."""
        length_R = self._length_R[self._is_paired_R]
        return int((length_R * (length_R - 1) // 2).sum())

    def iter_pairs(self) -> Iterator[tuple[IndexArray, IndexArray]]:
        """Yield arrays of these pairs: first the neighbours, then those at distance 2, ..."""
        runs = np.flatnonzero(self._is_paired_R & (self._length_R > 1))
        left = np.concatenate([np.empty(0, np.int64), _list_ranges(self._start_R[runs], self._length_R[runs])])
        end = np.repeat((self._start_R + self._length_R)[runs], self._length_R[runs])
        for distance in itertools.count(1):
            is_inside = left + distance < end
            left, end = left[is_inside], end[is_inside]
            if not len(left):
                return
            yield self._order_N[left], self._order_N[left + distance]


def _list_ranges(start_R: IndexArray, length_R: IndexArray) -> IndexArray:
    """Concatenate the ranges of the given starts and lengths."""
    offset = np.repeat(np.cumsum(length_R) - length_R, length_R)
    return np.repeat(start_R, length_R) + np.arange(len(offset)) - offset
