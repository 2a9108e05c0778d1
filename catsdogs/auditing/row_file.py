"""Rows on the local disk, in the order of their numbers, whatever order they arrive in.

The driver reads them from a memory-mapped file. So most of its memory does not grow with the number of rows: pages of
the file may be dropped, unlike Arrow's buffers and Python's objects.
"""

import mmap
from collections import defaultdict
from typing import IO

import numpy as np
import pyarrow as pa

CHUNK_ROWS = 10_000  # rows that are in memory until all of them have arrived


class RowFile:
    """Rows with the column `row`, their number.

    Args:
        file: open for reading and writing, empty. It may be closed after `read`.
        num_rows: in all.
    """

    def __init__(self, file: IO[bytes], num_rows: int) -> None:
        self._file, self._num_rows = file, num_rows
        self._writer: pa.RecordBatchFileWriter | None = None
        self._arrived: dict[int, list[pa.Table]] = defaultdict(list)  # of chunks that are not written, by number
        self._positions: dict[int, int] = {}  # of the written chunks, by number

    def add(self, rows: pa.Table) -> None:
        """Write the chunks that are complete now; OSError if the disk is full."""
        chunk_N = rows["row"].to_numpy() // CHUNK_ROWS
        for chunk in np.unique(chunk_N).tolist():
            arrived = self._arrived[chunk]
            arrived.append(rows.filter(pa.array(chunk_N == chunk)))
            if sum(map(len, arrived)) >= min(CHUNK_ROWS, self._num_rows - chunk * CHUNK_ROWS):
                self._write(chunk, pa.concat_tables(self._arrived.pop(chunk)))

    def _write(self, chunk: int, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, rows.schema)
        (batch,) = rows.sort_by("row").combine_chunks().to_batches()
        self._writer.write_batch(batch)
        self._positions[chunk] = len(self._positions)

    def read(self) -> pa.Table:
        """Return all rows, in order."""
        assert self._writer is not None, "no rows"
        self._writer.close()
        self._file.flush()
        content = pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        reader = pa.ipc.open_file(pa.BufferReader(content))
        table = pa.Table.from_batches([reader.get_batch(self._positions[chunk]) for chunk in sorted(self._positions)])
        is_complete = np.array_equal(table["row"].to_numpy(), np.arange(self._num_rows))
        assert is_complete, "not one row for each listed file"
        assert not self._arrived, "more than one row for a file"
        return table
