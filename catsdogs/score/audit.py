"""Stage 5, audit: check from the files alone that every listed file has exactly one row.

1. The paths of each part are those of its manifest.
2. Within a listing, paths ascend from shard to shard, so they are distinct.
3. No path is in two listings.

Ranges of shards (`shard_checks.py`) and intervals of paths (`listing_checks.py`) are checked concurrently, by threads
of this process or by tasks in others. Here the results are put together in order. Needs the memory of a few shards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from catsdogs import storage
from catsdogs.config import VerifyConfig
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Progress, StageProgress
from catsdogs.schema import build_schema
from catsdogs.score.listing_checks import find_repeated, split_paths
from catsdogs.score.parts import DamagedOutputError
from catsdogs.score.plan import MANIFEST, RUN, SUCCESS, SUMMARY, Plan, parse_record, part_name
from catsdogs.score.shard_checks import ShardRange, Totals, ascending_error, check_range
from catsdogs.score.threads import map_in_threads

SHARDS_PER_RANGE = 32  # a second of work, where a store answers in 50 ms
NUM_THREADS = 4  # each reads the files of SHARDS_PER_READ shards at once
MIN_SHARDS_FOR_TASKS = 256  # 2.5 million rows, which take this process a second

T = TypeVar("T")
R = TypeVar("R")


class ConcurrentMap(Protocol):
    """Calls a function with each item, concurrently, and yields the results in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


def verify(config: VerifyConfig, progress: Progress) -> dict[str, Any]:
    """Audit a finished output, its records and its summary; return the counts of its rows."""
    output = storage.absolute(config.output)
    uri = storage.join(output, RUN)
    found = storage.read_versioned(uri)
    if found is None:
        raise InputError(f"--output {output}: expected the output of a scoring run, found no {RUN}")
    settings = parse_record(uri, found[0])
    class_names = settings.get("class_names")
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"{uri}: expected a record of catsdogs with class_names, found {class_names!r:.80}")
    try:
        return _verify(output, settings, progress)
    except DamagedOutputError as error:
        repair = f"remove {SUCCESS} there, if it exists, and run the same score command again"
        raise RunError(f"{error}; {repair}") from error


def _verify(output: str, settings: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    plan = Plan.load(output)
    totals = audit(plan, settings, progress)
    if totals.stale:
        raise DamagedOutputError(f"{output}: the record of {totals.stale[0].part} is missing or wrong")
    if storage.read_versioned(storage.join(output, SUCCESS)) is None:
        raise RunError(f"{output}: all rows are there, but no {SUCCESS}; run the same score command again")
    uri = storage.join(output, SUMMARY)
    try:
        summary = parse_record(uri, storage.read_bytes(uri))
    except InputError as error:
        raise DamagedOutputError(str(error)) from error
    counts = totals.summarize(plan, settings["class_names"])
    for name, value in counts.items():
        if summary.get(name) != value:
            raise DamagedOutputError(f"{uri}: expected {name} {value}, found {summary.get(name)}")
    return counts


def audit(
    plan: Plan, settings: Mapping[str, Any], progress: Progress, map_in_tasks: ConcurrentMap | None = None
) -> Totals:
    """Compare all parts with their manifests and the settings of the run, which `_run.json` has.

    Args:
        map_in_tasks: checks a large plan in other processes; without it, threads of this one do.

    Raises:
        DamagedOutputError: the first difference.
    """
    _check_names(plan)
    is_large = len(plan.sizes) >= MIN_SHARDS_FOR_TASKS
    concurrent_map: ConcurrentMap = map_in_tasks if map_in_tasks is not None and is_large else _map_in_threads
    totals, first_keys = _check_shards(plan, settings, progress, concurrent_map)
    if len(plan.listing_first_shards) > 1:
        for path in concurrent_map(find_repeated, split_paths(plan, first_keys)):
            if path is not None:
                raise DamagedOutputError(f"{plan.output}/{MANIFEST}: {path!r} is listed twice")
    return totals


def _map_in_threads(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    return map_in_threads(function, items, NUM_THREADS)


def _check_shards(
    plan: Plan, settings: Mapping[str, Any], progress: Progress, concurrent_map: ConcurrentMap
) -> tuple[Totals, list[bytes]]:
    """Check each shard, and that paths ascend; return the first key of each shard, too, if there are more listings."""
    totals, num_files = Totals(), plan.num_files
    first_keys: list[bytes] = []
    last_key = b""
    ranges = _split_plan(plan, settings)
    for shards, checked in zip(ranges, concurrent_map(check_range, _split_plan(plan, settings)), strict=True):
        if shards.first in plan.listing_first_shards:
            last_key = b""
        if checked.first_keys and checked.first_keys[0] <= last_key:
            raise ascending_error(plan.manifest_uri(shards.first))
        if checked.error is not None:
            raise checked.error
        last_key = checked.last_key
        first_keys += checked.first_keys if len(plan.listing_first_shards) > 1 else []
        totals.add(checked.totals)
        progress(StageProgress("check", totals.rows, num_files))
    return totals, first_keys


def _split_plan(plan: Plan, settings: Mapping[str, Any]) -> Iterator[ShardRange]:
    """Split the shards of each listing into ranges."""
    schema = build_schema(bool(settings.get("save_embeddings")), settings.get("min_precision") is not None)
    for first, end in pairwise([*plan.listing_first_shards, len(plan.sizes)]):
        for start in range(first, end, SHARDS_PER_RANGE):
            sizes = tuple(plan.sizes[start : min(start + SHARDS_PER_RANGE, end)])
            yield ShardRange(plan.output, start, sizes, tuple(schema.names), settings.get("model_sha256"))


def _check_names(plan: Plan) -> None:
    if plan.listing_cursor is not None:
        raise DamagedOutputError(f"{plan.output}: its listing is not finished")
    if shards := plan.rescore_shards():
        raise DamagedOutputError(f"{plan.output}: rows of {len(shards)} parts are to be scored again")
    found = {name for name in storage.list_names(plan.output) if name.startswith("part-")}
    missing = [shard for shard in range(len(plan.sizes)) if part_name(shard) not in found]
    if missing:
        raise DamagedOutputError(
            f"{plan.output}: {len(missing)} of {len(plan.sizes)} parts are missing, {part_name(missing[0])} first"
        )
    if len(found) > len(plan.sizes):
        foreign = sorted(found.difference(map(part_name, range(len(plan.sizes)))))
        raise DamagedOutputError(f"{plan.output}/{foreign[0]}: no part of this scoring run; move it away")
