"""The input, listed -> the plan: new files in new shards, changed files to be labelled again.

A first listing is one against an empty plan. Both sides come in the order of `path_key`, so memory does not grow with
their number. What is listed becomes part of the plan a shard at a time; an interrupted listing goes on from there.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.progress import Message, Progress
from catsdogs.schema import RETRYABLE_STATUSES, parquet_bytes
from catsdogs.score.entries import list_inputs, sort_key
from catsdogs.score.parts import read_part, read_records
from catsdogs.score.plan import SUCCESS, Plan, build_files_table, part_name, read_files


class PlannedFile(NamedTuple):
    """A file that is in the plan already."""

    key: bytes
    path: str
    size_bytes: int | None
    version: str | None
    shard: int

    def differs(self, entry: storage.Entry) -> bool:
        """Whether the file was listed otherwise; a given manifest does not know sizes and versions."""
        sizes, versions = (self.size_bytes, entry.size_bytes), (self.version, entry.version)
        return any(listed is not None and listed != known for known, listed in (sizes, versions))


def iter_planned_files(plan: Plan, num_shards: int) -> Iterator[PlannedFile]:
    """Merge the files of the first shards of a plan, in order."""
    starts = [start for start in plan.listing_first_shards if start < num_shards]
    return heapq.merge(*(_iter_listing(plan, first, end) for first, end in pairwise([*starts, num_shards])))


def _iter_listing(plan: Plan, first: int, end: int) -> Iterator[PlannedFile]:
    for shard in range(first, end):
        files = read_files(plan.manifest_uri(shard))
        columns = (files[name].to_pylist() for name in ("path", "size_bytes", "version"))
        for path, size_bytes, version in zip(*columns, strict=True):
            yield PlannedFile(sort_key(path), path, size_bytes, version, shard)


class PlanUpdate:
    """One listing of the input against the plan."""

    def __init__(self, plan: Plan, config: ScoreConfig, progress: Progress, check_lease: Callable[[], None]) -> None:
        self._plan = plan
        self._config = config
        self._progress = progress
        self._check_lease = check_lease
        self._new: list[storage.Entry] = []
        self._changed: dict[int, list[storage.Entry]] = defaultdict(list)
        self._num_changed = 0
        self._begun = plan.listing_cursor is not None and bool(plan.listing_first_shards)
        if self._begun and config.limit is not None:  # how many came before the break is not known: from the start
            del plan.sizes[plan.listing_first_shards[-1] :]
            plan.listing_cursor = ""
        self._known = iter_planned_files(plan, plan.listing_first_shards[-1] if self._begun else len(plan.sizes))
        self._ahead = next(self._known, None)

    def run(self) -> None:
        """List, and bring the plan up to date; nothing is written where nothing differs.

        Raises:
            InputError: the input cannot be listed.
        """
        plan, unlisted = self._plan, dict[str, str]()
        entries = list_inputs(self._config, self._progress, unlisted, plan.listing_cursor or "")
        for entry in itertools.islice(entries, self._config.limit):
            self._compare(entry)
            if max(len(self._new), self._num_changed) >= self._config.shard_size:
                self._flush(entry.path)
        for folder, reason in unlisted.items():
            self._progress(Message(f"could not list {folder}: {reason}"))
        if self._new or self._changed or self._begun or plan.relisting or unlisted != plan.unlisted:
            plan.unlisted = unlisted
            self._flush(None)

    def _compare(self, entry: storage.Entry) -> None:
        """Set a listed file beside the planned one of its path."""
        key = sort_key(entry.path)
        while self._ahead is not None and self._ahead.key < key:
            self._ahead = next(self._known, None)
        if self._ahead is None or self._ahead.key > key:
            self._new.append(entry)
        elif self._ahead.differs(entry):
            self._changed[self._ahead.shard].append(entry)
            self._num_changed += 1

    def _flush(self, listing_cursor: str | None) -> None:
        """Make part of the plan what was found so far."""
        plan = self._plan
        self._check_lease()
        if not self._begun:
            self._begin()
        for shard, entries in self._changed.items():
            plan.request_rescore(shard, build_files_table(entries, shard))
        if self._new:
            shard = len(plan.sizes)
            storage.write_bytes(plan.manifest_uri(shard), parquet_bytes(build_files_table(self._new, shard)))
            plan.sizes.append(len(self._new))
        if listing_cursor is None and plan.listing_first_shards[-1] == len(plan.sizes):
            plan.listing_first_shards.pop()
        plan.listing_cursor = listing_cursor
        plan.relisting = listing_cursor is not None
        plan.save()
        self._new, self._changed, self._num_changed = [], defaultdict(list), 0

    def _begin(self) -> None:
        """Take back `_SUCCESS`, but first make sure that a driver which dies here lists again."""
        plan = self._plan
        if plan.listing_cursor is None:
            plan.relisting = True
            plan.save()
        storage.remove(storage.join(plan.output, SUCCESS))
        plan.listing_first_shards.append(len(plan.sizes))
        self._begun = True


def rescore_failed(plan: Plan, check_lease: Callable[[], None]) -> None:
    """Order the rows of finished parts whose failure may pass to be labelled again, as their files stand now."""
    finished = set(storage.list_names(plan.output))
    shards = [shard for shard in range(len(plan.sizes)) if part_name(shard) in finished]
    for shard, record in zip(shards, read_records(plan.output, shards), strict=True):
        if record is not None and not set(RETRYABLE_STATUSES) & set(record.by_status):
            continue
        rows = read_part(plan.part_uri(shard), ["path", "status"]).to_pylist()
        failed = [storage.Entry(row["path"]) for row in rows if row["status"] in RETRYABLE_STATUSES]
        if failed:
            check_lease()
            storage.remove(storage.join(plan.output, SUCCESS))
            plan.request_rescore(shard, build_files_table(failed, shard))
