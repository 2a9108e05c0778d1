"""Pairs of equal contents and of perceptual hashes, compared with all pairs."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from catsdogs.auditing import pairs
from catsdogs.auditing.pairs import MAX_PAIRED, find_near_pairs, find_pairs

NUM_HASHES = 700


def draw_hashes(near: int) -> np.ndarray:
    """Draw hashes, copies with up to near + 2 other bits, and equal ones."""
    generator = np.random.default_rng(near)
    hashes = generator.integers(0, 2**64, NUM_HASHES, dtype=np.uint64)
    flips = np.zeros(NUM_HASHES, np.uint64)
    for _ in range(near + 2):
        flips ^= np.uint64(1) << generator.integers(0, 64, NUM_HASHES, dtype=np.uint64)
    return np.concatenate([hashes, hashes ^ flips, hashes[:50], hashes[:20]])


def build_files(hashes: list[int | None], contents: list[bytes | None]) -> pa.Table:
    digests = [None if content is None else hashlib.sha256(content).digest() for content in contents]
    sizes = [None if content is None else len(content) for content in contents]
    columns = {"phash": pa.array(hashes, pa.uint64()), "sha256": pa.array(digests, pa.binary())}
    return pa.table(columns | {"size_bytes": pa.array(sizes, pa.int64())})


def list_pairs(files: pa.Table, num_audited: int | None = None, near: int = 4) -> list[tuple[int, int, int, bool]]:
    found = find_pairs(files, files.num_rows if num_audited is None else num_audited, near)
    columns = (found.a_P, found.b_P, found.distance_P, found.is_exact_P)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("near", [0, 1, 4, 7, 10])
def test_near_pairs_are_those_of_all_with_all(near):
    hashes = draw_hashes(near)
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(a, b): distances[a, b] for a, b in np.argwhere(np.triu(distances <= near, 1)).tolist()}
    found = find_near_pairs(hashes, near)
    rows = list(zip(found.a_P.tolist(), found.b_P.tolist(), strict=True))
    assert len(rows) == len(set(rows))
    assert dict(zip(rows, found.distance_P.tolist(), strict=True)) == expected
    assert len(expected) > 90
    assert found.unpaired == []


def test_equal_contents_are_exact_pairs_and_not_near_ones():
    files = build_files([7, 7, 7, 6, None], [b"a", b"a", b"b", b"c", b"a"])
    assert list_pairs(files) == [
        (0, 1, 0, True),
        (0, 2, 0, False),
        (0, 3, 1, False),
        (0, 4, 0, True),
        (1, 2, 0, False),
        (1, 3, 1, False),
        (1, 4, 0, True),
        (2, 3, 1, False),
    ]


def test_files_that_are_empty_or_unread_and_blank_images_are_no_pairs():
    files = build_files([None, None, None, None, None, None], [b"", b"", None, None, b"black", b"white"])
    assert list_pairs(files) == []


def test_pairs_within_the_other_set_are_left_out():
    files = build_files([1, 500, 1, 1], [b"a", b"b", b"a", b"c"])
    assert list_pairs(files, num_audited=2) == [(0, 2, 0, True), (0, 3, 0, False)]
    assert list_pairs(build_files([], [])) == []


def test_a_bucket_of_too_many_images_is_reported_and_not_paired():
    many = MAX_PAIRED + 1
    found = find_pairs(build_files([9] * many, [b"copy"] * many), many, 4)
    assert len(found.a_P) == 0
    assert {(bucket.kind, bucket.num_images) for bucket in found.unpaired} == {("exact", many), ("near", many)}
    contents = [str(i).encode() for i in range(many)]
    found = find_pairs(build_files([9] * many, contents), many, 4)
    assert (len(found.a_P), [bucket.kind for bucket in found.unpaired]) == (0, ["near"])
    # All of them agree in the upper 48 bits, so in at least one bucket; some are near all the same.
    alike = [i << 4 | 1 << 63 for i in range(many)]
    found = find_pairs(build_files([*alike, 5, 4], [*contents, b"y", b"z"]), many + 2, 2)
    assert {bucket.num_images for bucket in found.unpaired} == {many}
    assert (many, many + 1) in zip(found.a_P.tolist(), found.b_P.tolist(), strict=True)


def test_as_many_images_as_allowed_are_paired():
    found = find_near_pairs(np.full(MAX_PAIRED, 5, np.uint64), 4)
    assert (len(found.a_P), found.unpaired) == (MAX_PAIRED * (MAX_PAIRED - 1) // 2, [])


@pytest.mark.parametrize("kind", ["exact", "equal hashes", "near"])
def test_too_many_pairs_in_all_leave_out_the_largest_buckets(monkeypatch, kind):
    """A group of 60 images has up to 1,770 pairs, ten groups of 4 have 60."""
    monkeypatch.setattr(pairs, "MAX_PAIRS", 500)
    group = np.concatenate([np.zeros(60, int), np.repeat(np.arange(1, 11), 4)])
    hashes = np.random.default_rng(0).integers(0, 2**64, 11, dtype=np.uint64)[group]
    if kind == "near":  # differ in up to 6 bits, all in the lowest band
        hashes[:60] ^= np.arange(60, dtype=np.uint64)
    contents = [str(number if kind == "exact" else i).encode() for i, number in enumerate(group)]
    found = find_pairs(build_files(hashes.tolist(), contents), len(group), 4)
    assert len(found.a_P) == 10 * 6
    assert found.a_P.min() == 60
    assert found.max_paired[kind.split()[0] if kind != "equal hashes" else "near"] == 31
    assert max(bucket.num_images for bucket in found.unpaired) == 60
