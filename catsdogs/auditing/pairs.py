"""Find pairs of images: equal contents, and perceptual hashes that differ in few bits.

Near pairs need no comparison of all with all. The 64 bits are cut into `near` + AGREEING bands, as equal as possible.
Two hashes that differ in at most `near` bits agree in AGREEING bands at least (pigeonhole principle). So for each
choice of AGREEING bands, only images with equal bits there, a bucket, are compared. With more bands that agree, there
are more choices but far smaller buckets (Norouzi et al. 2012, "Fast search in Hamming space with multi-index hashing",
arXiv 1307.2982, has one band).

Shapes: N images, U different hashes, P pairs, R runs of equal keys.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

HASH_BITS = 64
AGREEING = 3  # bands; near = 4: 35 choices of 27 bits
MAX_PAIRED = 1000  # images of a bucket or of equal content; of more, no pairs are made
NO_CONTENT = -1

IndexArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


class Bucket(NamedTuple):
    """Images that are too many to be paired, and the row of one of them."""

    kind: str
    num_images: int
    row: int


class Pairs(NamedTuple):
    """Pairs of rows a < b, sorted by a, then b.

    Attributes:
        distance_P: bits in which the hashes differ; 0 for equal contents.
        is_exact_P: whether the contents are equal.
        content_N: the number of each row's content, NO_CONTENT for a file that is empty or could not be read.
        unpaired: buckets with more than MAX_PAIRED images.
    """

    a_P: IndexArray
    b_P: IndexArray
    distance_P: npt.NDArray[np.uint8]
    is_exact_P: BoolArray
    content_N: IndexArray
    unpaired: list[Bucket]


class _Found(NamedTuple):
    """Pairs of one kind, not sorted."""

    a_P: IndexArray
    b_P: IndexArray
    distance_P: npt.NDArray[np.uint8]
    unpaired: list[Bucket]


def find_pairs(files: pa.Table, num_audited: int, near: int) -> Pairs:
    """Find equal and near pairs in which at least one image is of the set.

    Args:
        files: `sha256`, `size_bytes`, `phash`; first the `num_audited` of the set.
        near: greatest distance of a near pair, in bits.
    """
    content_N = _number_contents(files)
    with_content = np.flatnonzero(content_N != NO_CONTENT)
    with_hash = np.flatnonzero(files["phash"].is_valid().to_numpy())
    hashes = files["phash"].drop_null().to_numpy()
    exact = _pair_equal(content_N[with_content], with_content, "exact")
    near_pairs = find_near_pairs(hashes, near)
    a, b = with_hash[near_pairs.a_P], with_hash[near_pairs.b_P]
    differ = (content_N[a] != content_N[b]) | (content_N[a] == NO_CONTENT)
    a_P, b_P = np.concatenate([exact.a_P, a[differ]]), np.concatenate([exact.b_P, b[differ]])
    distance_P = np.concatenate([exact.distance_P, near_pairs.distance_P[differ]])
    kept = np.flatnonzero(np.minimum(a_P, b_P) < num_audited)
    order = kept[np.lexsort((b_P[kept], a_P[kept]))]
    unpaired_near = [bucket._replace(row=int(with_hash[bucket.row])) for bucket in near_pairs.unpaired]
    return Pairs(
        a_P[order], b_P[order], distance_P[order], order < len(exact.a_P), content_N, exact.unpaired + unpaired_near
    )


def _number_contents(files: pa.Table) -> IndexArray:
    """Give equal contents equal numbers."""
    numbers = files["sha256"].combine_chunks().dictionary_encode().indices.fill_null(NO_CONTENT)
    is_empty = pc.equal(files["size_bytes"], 0).fill_null(False).to_numpy()
    return np.where(is_empty, NO_CONTENT, numbers.to_numpy()).astype(np.int64)


def find_near_pairs(hashes_N: HashArray, near: int) -> _Found:
    """Find the pairs of hashes that differ in at most `near` bits."""
    hashes_U, hash_N, count_U = np.unique(hashes_N, return_inverse=True, return_counts=True)
    equal = _pair_equal(hash_N, np.arange(len(hashes_N)), "near")
    different = _pair_different(hashes_U, count_U, near)
    by_hash = np.argsort(hash_N, kind="stable")
    start_U = np.cumsum(count_U) - count_U
    pair, a, b = _expand(count_U[different.a_P], count_U[different.b_P])
    a, b = by_hash[start_U[different.a_P][pair] + a], by_hash[start_U[different.b_P][pair] + b]
    buckets = [bucket._replace(row=int(by_hash[start_U[bucket.row]])) for bucket in different.unpaired]
    return _Found(
        np.concatenate([equal.a_P, np.minimum(a, b)]),
        np.concatenate([equal.b_P, np.maximum(a, b)]),
        np.concatenate([equal.distance_P, different.distance_P[pair]]),
        equal.unpaired + buckets,
    )


def _expand(num_a_P: IndexArray, num_b_P: IndexArray) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Enumerate the pairs of images of each pair of hashes: the pair, and the positions among the images of each."""
    num_P = num_a_P * num_b_P
    pair = np.repeat(np.arange(len(num_P)), num_P)
    position = np.arange(len(pair)) - np.repeat(np.cumsum(num_P) - num_P, num_P)
    return pair, position // num_b_P[pair], position % num_b_P[pair]


def _pair_different(hashes_U: HashArray, count_U: IndexArray, near: int) -> _Found:
    """Find the pairs among different hashes, which stand for several images each."""
    num_hashes = len(hashes_U)
    codes = np.empty(0, np.int64)
    buckets: dict[Bucket, None] = {}
    for mask in _list_masks(near) if near else ():
        runs = _Runs(hashes_U & mask, count_U)
        buckets |= dict.fromkeys(runs.list_unpaired("near"))
        found = [codes]
        for a, b in runs.iter_pairs():
            close = np.bitwise_count(hashes_U[a] ^ hashes_U[b]) <= near
            found.append(np.minimum(a[close], b[close]) * num_hashes + np.maximum(a[close], b[close]))
        codes = np.unique(np.concatenate(found))  # a pair may agree in more than one choice of bands
    a_P, b_P = np.divmod(codes, max(1, num_hashes))
    return _Found(a_P, b_P, np.bitwise_count(hashes_U[a_P] ^ hashes_U[b_P]), list(buckets))


def _list_masks(near: int) -> list[np.uint64]:
    """List the masks of all choices of AGREEING bands."""
    ends = np.linspace(0, HASH_BITS, near + AGREEING + 1).round().astype(int).tolist()
    bands = [sum(1 << bit for bit in range(start, end)) for start, end in itertools.pairwise(ends)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(bands, AGREEING)]


def _pair_equal(key_N: IndexArray, row_N: IndexArray, kind: str) -> _Found:
    """Pair the rows that have the same key."""
    runs = _Runs(key_N, np.ones(len(key_N), np.int64))
    pairs = [(np.empty(0, np.int64), np.empty(0, np.int64)), *runs.iter_pairs()]
    a, b = (np.concatenate(sides) for sides in zip(*pairs, strict=True))
    unpaired = [bucket._replace(row=int(row_N[bucket.row])) for bucket in runs.list_unpaired(kind)]
    return _Found(row_N[np.minimum(a, b)], row_N[np.maximum(a, b)], np.zeros(len(a), np.uint8), unpaired)


class _Runs:
    """Items sorted by key; the items with one key are a run.

    Args:
        num_N: images that each item stands for.
    """

    def __init__(self, key_N: IndexArray | HashArray, num_N: IndexArray) -> None:
        self._order_N = np.argsort(key_N)
        sorted_N = key_N[self._order_N]
        is_start_N = np.ones(len(key_N), np.bool_)
        is_start_N[1:] = sorted_N[1:] != sorted_N[:-1]
        self._start_R = np.flatnonzero(is_start_N)
        self._length_R = np.diff(self._start_R, append=len(key_N))
        self._images_R = np.add.reduceat(num_N[self._order_N], self._start_R) if len(key_N) else self._length_R

    def list_unpaired(self, kind: str) -> list[Bucket]:
        """List the runs of several items with more than MAX_PAIRED images; `row` is the first item of each."""
        runs = np.flatnonzero((self._images_R > MAX_PAIRED) & (self._length_R > 1))
        first = self._order_N[self._start_R[runs]].tolist()
        return [Bucket(kind, *found) for found in zip(self._images_R[runs].tolist(), first, strict=True)]

    def iter_pairs(self) -> Iterator[tuple[IndexArray, IndexArray]]:
        """Yield arrays of the pairs of items of the other runs: first the neighbours, then those at distance 2, ..."""
        runs = np.flatnonzero((self._images_R <= MAX_PAIRED) & (self._length_R > 1))
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
