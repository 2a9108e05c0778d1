"""Large blocks for models on GPUs: Ray Data takes about 10 ms of its driver for each block, whatever its size.

    find_block_rows, split_files    listed files -> blocks, each decoded by one task
    join_batches        batches that a task decodes -> blocks, each classified by one call
    pack_block, unpack_blocks    a block <-> one row of Ray Data

With GPUs, `map_batches` requires a batch size. It joins blocks that are smaller, in the order in which they arrive, and
splits those that are larger, so that the rows of a batch would depend on timing. A block that is one row stays whole.
"""

import itertools
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_BLOCK_ROWS = 3584  # 14 batches of 256, so that a shard of 10,000 files makes three blocks
MAX_BLOCK_BYTES = 256 << 20  # of encoded files or decoded pixels; one batch more at most
MAX_BLOCK_S = 2.0  # after it, a block is passed on: files may be slow to read or to decode
PACKED = "packed"


def find_block_rows(num_rows: int, batch_size: int, min_blocks: int) -> int:
    """Return the rows of a block of whole batches.

    Args:
        num_rows: of all blocks together.
        min_blocks: if there are enough files, so that small inputs also keep all CPUs busy.
    """
    batches = -(-num_rows // (batch_size * min_blocks))
    return max(batch_size, min(MAX_BLOCK_ROWS // batch_size, batches) * batch_size)


def split_files(files: pa.Table, batch_size: int, min_blocks: int) -> list[pa.Table]:
    """Split listed files into blocks of whole batches; `min_blocks` as `find_block_rows` has it.

    A batch of more than MAX_BLOCK_BYTES is split into smaller ones, a block each, and the next batch begins where it
    ends. So batches depend on the files alone, not on the number of rows of a block, and files may be split in parts of
    whole batches.
    """
    max_rows = find_block_rows(files.num_rows, batch_size, min_blocks)
    sizes = pc.fill_null(files["size_bytes"], 0).to_numpy()
    blocks: list[pa.Table] = []
    start = 0
    while start < files.num_rows:
        is_split = start % batch_size
        ends = np.cumsum(sizes[start : start + (batch_size - is_split if is_split else max_rows)])
        rows = int(np.searchsorted(ends, MAX_BLOCK_BYTES, side="right"))
        if rows < len(ends):
            rows = max(1, rows // batch_size * batch_size or rows)
        blocks.append(files.slice(start, rows))
        start += rows
    return blocks


def join_batches(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join batches to blocks of at most MAX_BLOCK_ROWS and MAX_BLOCK_BYTES that took about MAX_BLOCK_S."""
    block: list[pa.Table] = []
    started = time.monotonic()
    for batch in batches:
        joined = [*block, batch]
        is_too_large = sum(table.num_rows for table in joined) > MAX_BLOCK_ROWS or (
            sum(table.nbytes for table in joined) > MAX_BLOCK_BYTES
        )
        if block and (is_too_large or time.monotonic() - started > MAX_BLOCK_S):
            yield pa.concat_tables(block)
            joined, started = [batch], time.monotonic()
        block = joined
    if block:
        yield pa.concat_tables(block)


def pack_block(rows: pa.Table) -> pa.Table:
    """Serialize a block to a table of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    content = sink.getvalue()
    ends = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.table({PACKED: pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, content])})


def unpack_blocks(packed: pa.Table) -> Iterator[pa.Table]:
    """Yield the blocks of a table without copying them; a table that is not packed is yielded as it is."""
    if packed.column_names != [PACKED]:
        yield packed
        return
    for chunk in packed[PACKED].chunks:
        _, offsets, content = chunk.buffers()  # a scalar's buffer would be a copy
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        for start, end in itertools.pairwise(ends):
            yield pa.ipc.open_stream(content.slice(start, end - start)).read_all()
