"""Find pairs of images: equal contents, and perceptual hashes that differ in few bits.

Near pairs need no comparison of all with all. The 64 bits are cut into `near` + AGREEING bands, as equal as possible.
Two hashes that differ in at most `near` bits agree in AGREEING bands at least (pigeonhole principle). So for each
choice of AGREEING bands, only images with equal bits there, a bucket, are compared. With more bands that agree, there
are more choices but far smaller buckets (Norouzi et al. 2012, "Fast search in Hamming space with multi-index hashing",
arXiv 1307.2982, has one band).

A set of images that are nearly all alike has nearly as many pairs as all with all. So a bucket with more than
MAX_PAIRED images is reported and not paired. If the others have more than MAX_PAIRS pairs together, the limit of a
bucket is halved until they have not.

Shapes: N images, U different hashes, P pairs, R runs of equal keys.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.auditing.runs import Bucket, HashArray, IndexArray, Runs

HASH_BITS = 64
AGREEING = 3  # bands; near = 4: 35 choices of 27 bits
MAX_PAIRED = 1000  # images of a bucket or of equal content; of more, no pairs are made
MAX_PAIRS = 5_000_000  # of each kind; the audit needs about 100 bytes for each
CHUNK_PAIRS = 1 << 18
DIGEST = np.dtype("S32")
NO_CONTENT = -1

RowArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


class Pairs(NamedTuple):
    """Pairs of rows a < b, sorted by a, then b.

    Attributes:
        distance_P: bits in which the hashes differ; 0 for equal contents.
        is_exact_P: whether the contents are equal.
        content_N: the number of each row's content, NO_CONTENT for a file that is empty or could not be read.
        unpaired: buckets with more images than `max_paired`.
        max_paired: images of a bucket of each kind.
    """

    a_P: RowArray
    b_P: RowArray
    distance_P: npt.NDArray[np.uint8]
    is_exact_P: BoolArray
    content_N: IndexArray
    unpaired: list[Bucket]
    max_paired: dict[str, int]


class _Found(NamedTuple):
    """Pairs of one kind, not sorted."""

    a_P: RowArray
    b_P: RowArray
    distance_P: npt.NDArray[np.uint8]
    unpaired: list[Bucket]
    max_paired: int


class _TooManyPairsError(Exception):
    """More than MAX_PAIRS."""


def find_pairs(files: pa.Table, num_audited: int, near: int) -> Pairs:
    """Find equal and near pairs in which at least one image is of the set.

    Args:
        files: `sha256`, `size_bytes`, `phash`; first the `num_audited` of the set.
        near: greatest distance of a near pair, in bits.
    """
    content_N = _number_contents(files)
    with_content = np.flatnonzero(content_N != NO_CONTENT)
    with_hash = np.flatnonzero(files["phash"].is_valid().to_numpy()).astype(np.int32)
    exact = _limit(lambda max_paired: _pair_equal(content_N[with_content], with_content, "exact", max_paired))
    found = find_near_pairs(files["phash"].drop_null().to_numpy(), near)
    a, b = with_hash[found.a_P], with_hash[found.b_P]
    differ = (content_N[a] != content_N[b]) | (content_N[a] == NO_CONTENT)
    a_P, b_P = np.concatenate([exact.a_P, a[differ]]), np.concatenate([exact.b_P, b[differ]])
    distance_P = np.concatenate([exact.distance_P, found.distance_P[differ]])
    kept = np.flatnonzero(np.minimum(a_P, b_P) < num_audited)
    order = kept[np.argsort(a_P[kept] * np.int64(len(files)) + b_P[kept])]
    unpaired_near = [bucket._replace(row=int(with_hash[bucket.row])) for bucket in found.unpaired]
    return Pairs(
        a_P[order],
        b_P[order],
        distance_P[order],
        order < len(exact.a_P),
        content_N,
        exact.unpaired + unpaired_near,
        {"exact": exact.max_paired, "near": found.max_paired},
    )


def _number_contents(files: pa.Table) -> IndexArray:
    """Give equal contents equal numbers."""
    is_content = pc.and_(files["sha256"].is_valid(), pc.not_equal(files["size_bytes"], 0).fill_null(True))
    digests = files["sha256"].filter(is_content).cast(pa.binary(DIGEST.itemsize)).combine_chunks()
    numbers_N = np.full(files.num_rows, NO_CONTENT)
    if len(digests):
        digest_N = np.frombuffer(digests.buffers()[1], DIGEST, len(digests), digests.offset * DIGEST.itemsize)
        numbers_N[is_content.to_numpy()] = np.unique(digest_N, return_inverse=True)[1]
    return numbers_N


def _limit(find: Callable[[int], _Found]) -> _Found:
    """Find pairs with the largest limit of a bucket that gives at most MAX_PAIRS."""
    max_paired = MAX_PAIRED
    while True:
        try:
            return find(max_paired)
        except _TooManyPairsError:
            max_paired //= 2


def _check_number(num_pairs: int) -> None:
    if num_pairs > MAX_PAIRS:
        raise _TooManyPairsError


def find_near_pairs(hashes_N: HashArray, near: int) -> _Found:
    """Find the pairs of hashes that differ in at most `near` bits."""
    hashes_U, hash_N, count_U = np.unique(hashes_N, return_inverse=True, return_counts=True)
    by_hash = np.argsort(hash_N, kind="stable")

    def find(max_paired: int) -> _Found:
        equal = _pair_equal(hash_N, np.arange(len(hashes_N)), "near", max_paired)
        codes, buckets = _pair_different(hashes_U, count_U, near, max_paired)
        a_U, b_U = np.divmod(codes, max(1, len(hashes_U)))
        _check_number(len(equal.a_P) + int((count_U[a_U] * count_U[b_U]).sum()))
        a_P, b_P, pair_P = _expand(a_U, b_U, count_U, by_hash)
        distance_P = np.bitwise_count(hashes_U[a_U] ^ hashes_U[b_U])[pair_P]
        first_U = by_hash[np.cumsum(count_U) - count_U]
        return _Found(
            np.concatenate([equal.a_P, np.minimum(a_P, b_P)]),
            np.concatenate([equal.b_P, np.maximum(a_P, b_P)]),
            np.concatenate([equal.distance_P, distance_P]),
            equal.unpaired + [bucket._replace(row=int(first_U[bucket.row])) for bucket in buckets],
            max_paired,
        )

    return _limit(find)


def _expand(
    a_U: IndexArray, b_U: IndexArray, count_U: IndexArray, by_hash_N: IndexArray
) -> tuple[RowArray, RowArray, RowArray]:
    """Enumerate the pairs of images of each pair of hashes: the images, and the pair of hashes."""
    start_U = np.cumsum(count_U) - count_U
    num_P = count_U[a_U] * count_U[b_U]
    parts = [(np.empty(0, np.int32),) * 3]
    for first in range(0, len(a_U), CHUNK_PAIRS):
        num, a, b = (array[first : first + CHUNK_PAIRS] for array in (num_P, a_U, b_U))
        pair = np.repeat(np.arange(len(num)), num)
        position = np.arange(len(pair)) - np.repeat(np.cumsum(num) - num, num)
        row_a = by_hash_N[start_U[a[pair]] + position // count_U[b[pair]]]
        row_b = by_hash_N[start_U[b[pair]] + position % count_U[b[pair]]]
        parts.append((row_a.astype(np.int32), row_b.astype(np.int32), (first + pair).astype(np.int32)))
    a_P, b_P, pair_P = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return a_P, b_P, pair_P


def _pair_different(
    hashes_U: HashArray, count_U: IndexArray, near: int, max_paired: int
) -> tuple[IndexArray, list[Bucket]]:
    """Find the pairs a < b among different hashes, which stand for several images each, as numbers a * U + b."""
    num_hashes = len(hashes_U)
    found, num_found = [np.empty(0, np.int64)], 0
    buckets: dict[Bucket, None] = {}
    for mask in _list_masks(near) if near else ():
        runs = Runs(hashes_U & mask, count_U, max_paired)
        buckets |= dict.fromkeys(runs.list_unpaired("near"))
        num_new = 0
        for a, b in runs.iter_pairs():
            close = np.bitwise_count(hashes_U[a] ^ hashes_U[b]) <= near
            found.append(np.minimum(a[close], b[close]) * num_hashes + np.maximum(a[close], b[close]))
            num_new += len(found[-1])
            _check_number(num_new)
        num_found += num_new
        if num_found > MAX_PAIRS:
            found, num_found = [_merge(found)], 0
    return _merge(found), list(buckets)


def _merge(codes: list[IndexArray]) -> IndexArray:
    """Return each pair once: one may agree in several choices of bands."""
    merged = np.unique(np.concatenate(codes))
    _check_number(len(merged))
    return merged


def _list_masks(near: int) -> list[np.uint64]:
    """List the masks of all choices of AGREEING bands."""
    ends = np.linspace(0, HASH_BITS, near + AGREEING + 1).round().astype(int).tolist()
    bands = [sum(1 << bit for bit in range(start, end)) for start, end in itertools.pairwise(ends)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(bands, AGREEING)]


def _pair_equal(key_N: IndexArray, row_N: IndexArray, kind: str, max_paired: int) -> _Found:
    """Pair the rows that have the same key."""
    runs = Runs(key_N, np.ones(len(key_N), np.int64), max_paired)
    _check_number(runs.count_pairs())
    parts = [(np.empty(0, np.int32),) * 2]
    for a, b in runs.iter_pairs():
        rows = row_N[np.minimum(a, b)], row_N[np.maximum(a, b)]
        parts.append((rows[0].astype(np.int32), rows[1].astype(np.int32)))
    a_P, b_P = (np.concatenate(sides) for sides in zip(*parts, strict=True))
    unpaired = [bucket._replace(row=int(row_N[bucket.row])) for bucket in runs.list_unpaired(kind)]
    return _Found(a_P, b_P, np.zeros(len(a_P), np.uint8), unpaired, max_paired)
