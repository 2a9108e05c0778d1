"""Large blocks: files split into them, batches joined to them, and one row of Ray Data for each."""

import numpy as np
import pyarrow as pa
import pytest

from catsdogs import data
from catsdogs.data import blocks
from catsdogs.data.blocks import join_batches, split_files
from catsdogs.schema import FILES

BATCH_SIZE = 4
MAX_BYTES = 1000


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_ROWS", 16)
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", MAX_BYTES)


def list_files(sizes):
    return pa.table([[f"{i}.jpg" for i in range(len(sizes))], sizes, [None] * len(sizes)], schema=FILES)


def split_batches(files, **settings):
    """Return the paths of each batch that a model gets."""
    found = []
    for block in split_files(files, BATCH_SIZE, **settings):
        paths = block["path"].to_pylist()
        found += [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    return found


def test_a_block_has_many_batches():
    split = split_files(list_files([10] * 50), BATCH_SIZE, min_blocks=1)
    assert [block.num_rows for block in split] == [16, 16, 16, 2]


def test_few_files_make_enough_blocks_for_all_cpus():
    split = split_files(list_files([10] * 50), BATCH_SIZE, min_blocks=6)
    assert [block.num_rows for block in split] == [12, 12, 12, 12, 2]
    assert {block.num_rows for block in split_files(list_files([10] * 8), BATCH_SIZE, min_blocks=99)} == {BATCH_SIZE}


def test_large_files_make_small_blocks():
    sizes = [100] * 16 + [400] * 6 + [5000, 300]
    split = split_files(list_files(sizes), BATCH_SIZE, min_blocks=1)
    assert [block.num_rows for block in split] == [8, 8, 2, 2, 2, 1, 1]
    assert all(sum(block["size_bytes"].to_pylist()) <= MAX_BYTES or block.num_rows == 1 for block in split)


def test_files_of_unknown_size_make_full_blocks():
    assert [block.num_rows for block in split_files(list_files([None] * 20), BATCH_SIZE, min_blocks=1)] == [16, 4]


def test_no_files_make_no_block():
    assert split_files(list_files([]), BATCH_SIZE, min_blocks=1) == []


@pytest.mark.parametrize("seed", range(5))
def test_batches_do_not_depend_on_the_size_of_a_block(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    files = list_files(np.where(rng.random(300) < 0.1, 700, rng.integers(0, 120, 300)).tolist())
    expected = split_batches(files, min_blocks=1)
    assert [path for batch in expected for path in batch] == files["path"].to_pylist()
    assert len({len(batch) for batch in expected}) > 1
    for max_rows in (BATCH_SIZE, 2 * BATCH_SIZE, 10**6):
        monkeypatch.setattr(blocks, "MAX_BLOCK_ROWS", max_rows)
        assert split_batches(files, min_blocks=1) == expected
        assert split_batches(files, min_blocks=20) == expected
    for rows in (BATCH_SIZE, 3 * BATCH_SIZE):  # tasks that read a part of a manifest each
        parts = [files.slice(start, rows) for start in range(0, files.num_rows, rows)]
        assert [batch for part in parts for batch in split_batches(part, min_blocks=1)] == expected


def make_batches(*num_rows, num_bytes=8):
    return [pa.table({"content": pa.array([bytes(num_bytes)] * rows, pa.large_binary())}) for rows in num_rows]


def count_rows(batches):
    return [block.num_rows for block in join_batches(batches)]


def test_batches_are_joined_to_blocks():
    assert count_rows(make_batches(4, 4, 4, 4, 4, 3)) == [16, 7]
    assert count_rows([]) == []


def test_a_block_ends_where_it_has_many_bytes():
    assert count_rows(make_batches(4, 4, 4, num_bytes=100)) == [8, 4]
    assert count_rows(make_batches(4, 4, num_bytes=400)) == [4, 4]


def test_a_block_ends_when_it_took_long(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_S", -1)
    assert count_rows(make_batches(4, 4, 4)) == [4, 4, 4]


def test_a_packed_block_is_one_row_and_is_unpacked_without_a_copy():
    block = pa.concat_tables(make_batches(4, 3, num_bytes=50))
    packed = data.pack_block(block)
    assert packed.num_rows == 1
    (found,) = data.unpack_blocks(packed)
    assert found.equals(block)
    (content,) = packed["packed"].chunk(0).buffers()[2:]
    for chunk in found["content"].chunks:
        assert content.address < chunk.buffers()[2].address < content.address + content.size


def test_several_packed_blocks_are_unpacked_and_others_left():
    batches = make_batches(1, 2)
    assert [block.num_rows for block in data.unpack_blocks(pa.concat_tables(map(data.pack_block, batches)))] == [1, 2]
    assert list(data.unpack_blocks(batches[1])) == [batches[1]]
