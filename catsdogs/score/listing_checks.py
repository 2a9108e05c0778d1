"""Check that no path is in two listings of a plan. Runs in threads or in Ray tasks.

Within a listing paths ascend, so the first path of each shard says which shards may list a path. The paths are divided
into intervals. Each is checked with the shards of all listings that reach into it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.score.parts import read_tables
from catsdogs.score.plan import Plan
from catsdogs.score.shard_checks import read_sort_keys

SHARDS_PER_INTERVAL = 32  # about so many begin in an interval; beside them, one of each listing may reach into it


@dataclass(frozen=True)
class PathInterval:
    """Paths whose keys are at least `start` and below `end`, if that is not None; `shards` may list them."""

    output: str
    shards: tuple[int, ...]
    start: bytes
    end: bytes | None


def split_paths(plan: Plan, first_keys: Sequence[bytes]) -> Iterator[PathInterval]:
    """Yield the intervals that several listings reach into.

    Args:
        first_keys: of the files of each shard, in the order of `sort_key`.
    """
    listings = list(pairwise([*plan.listing_first_shards, len(first_keys)]))
    borders = sorted(first_keys)[:: max(SHARDS_PER_INTERVAL, len(listings))]
    for start, end in pairwise([*borders, None]):
        assert start is not None
        shards: list[range] = []
        for first, stop in listings:
            begin = max(first, bisect_right(first_keys, start, first, stop) - 1)
            shards.append(range(begin, stop if end is None else bisect_left(first_keys, end, first, stop)))
        if sum(map(bool, shards)) > 1:
            yield PathInterval(plan.output, tuple(shard for several in shards for shard in several), start, end)


def find_repeated(interval: PathInterval) -> str | None:
    """Return the first path of an interval that is listed twice; None if there is none."""
    manifest_uri = Plan(interval.output).manifest_uri
    tables = [_select(interval, one) for one in read_tables([*map(manifest_uri, interval.shards)], ["path"], ["path"])]
    files = pa.concat_tables(tables).combine_chunks()
    counts = files["key"].value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated) == 0:
        return None
    path: str = files["path"][pc.index(files["key"], pc.min(repeated)).as_py()].as_py()
    return path


def _select(interval: PathInterval, manifest: pa.Table) -> pa.Table:
    """Select the files of a manifest that are in an interval, and add their keys."""
    keys = read_sort_keys(manifest["path"])
    files = manifest.append_column("key", keys).filter(pc.greater_equal(keys, pa.scalar(interval.start, pa.binary())))
    return files if interval.end is None else files.filter(pc.less(files["key"], pa.scalar(interval.end, pa.binary())))
