"""Rows in a temporary file: in order, complete, and not in memory."""

import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pytest

from catsdogs.auditing import row_file
from catsdogs.auditing.row_file import RowFile


def build_rows(rows: np.ndarray) -> pa.Table:
    return pa.table({"row": rows, "path": [f"{row:0100}" for row in rows]})


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        yield file


def test_rows_that_arrive_in_any_order_are_read_in_order(file, monkeypatch):
    monkeypatch.setattr(row_file, "CHUNK_ROWS", 10)
    written = RowFile(file, 95)
    for rows in np.split(np.random.default_rng(0).permutation(95), [1, 30, 31, 80]):
        written.add(build_rows(rows))
    assert written.read().equals(build_rows(np.arange(95)))


@pytest.mark.parametrize("rows", [[0, 1, 3], [0, 1, 1, 2], [0, 1, 2, 3, 3]])
def test_a_row_that_is_missing_or_there_twice_is_no_result(file, rows):
    written = RowFile(file, 4)
    for row in rows:
        written.add(build_rows(np.array([row])))
    with pytest.raises(AssertionError):
        written.read()


def test_rows_take_no_memory(file):
    written, before = RowFile(file, 50_000), pa.total_allocated_bytes()
    for start in range(0, 50_000, 1000):
        written.add(build_rows(np.arange(start, start + 1000)))
    table = written.read()
    file.close()
    assert pa.total_allocated_bytes() - before < 100_000
    assert table["path"][49_999].as_py() == f"{49_999:0100}"
