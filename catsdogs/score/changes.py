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
from catsdogs.schema import RETRIED, parquet_bytes
from catsdogs.score.entries import entries_of, path_key
from catsdogs.score.parts import read_part, read_records
from catsdogs.score.plan import SUCCESS, Plan, files_table, part_name, read_files


class Known(NamedTuple):
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


def planned(plan: Plan, num_shards: int) -> Iterator[Known]:
    """Merge the files of the first shards of a plan, in order."""
    starts = [start for start in plan.generations if start < num_shards]
    return heapq.merge(*(_generation(plan, first, end) for first, end in pairwise([*starts, num_shards])))


def _generation(plan: Plan, first: int, end: int) -> Iterator[Known]:
    for shard in range(first, end):
        files = read_files(plan.manifest_uri(shard))
        columns = (files[name].to_pylist() for name in ("path", "size_bytes", "version"))
        for path, size_bytes, version in zip(*columns, strict=True):
            yield Known(path_key(path), path, size_bytes, version, shard)


class Relisting:
    """One listing of the input against the plan."""

    def __init__(self, plan: Plan, config: ScoreConfig, progress: Progress, guard: Callable[[], None]) -> None:
        self._plan = plan
        self._config = config
        self._progress = progress
        self._guard = guard
        self._new: list[storage.Entry] = []
        self._changed: dict[int, list[storage.Entry]] = defaultdict(list)
        self._num_changed = 0
        self._begun = plan.listed_to is not None and bool(plan.generations)
        if self._begun and config.limit is not None:  # how many came before the break is not known: from the start
            del plan.sizes[plan.generations[-1] :]
            plan.listed_to = ""
        self._known = planned(plan, plan.generations[-1] if self._begun else len(plan.sizes))
        self._ahead = next(self._known, None)

    def run(self) -> None:
        """List, and bring the plan up to date; nothing is written where nothing differs.

        Raises:
            InputError: the input cannot be listed.
        """
        plan, unlisted = self._plan, dict[str, str]()
        entries = entries_of(self._config, self._progress, unlisted, plan.listed_to or "")
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
        key = path_key(entry.path)
        while self._ahead is not None and self._ahead.key < key:
            self._ahead = next(self._known, None)
        if self._ahead is None or self._ahead.key > key:
            self._new.append(entry)
        elif self._ahead.differs(entry):
            self._changed[self._ahead.shard].append(entry)
            self._num_changed += 1

    def _flush(self, listed_to: str | None) -> None:
        """Make part of the plan what was found so far."""
        plan = self._plan
        self._guard()
        if not self._begun:
            self._begin()
        for shard, entries in self._changed.items():
            plan.add_redo(shard, files_table(entries, shard))
        if self._new:
            shard = len(plan.sizes)
            storage.write_bytes(plan.manifest_uri(shard), parquet_bytes(files_table(self._new, shard)))
            plan.sizes.append(len(self._new))
        if listed_to is None and plan.generations[-1] == len(plan.sizes):
            plan.generations.pop()
        plan.listed_to = listed_to
        plan.relisting = listed_to is not None
        plan.save()
        self._new, self._changed, self._num_changed = [], defaultdict(list), 0

    def _begin(self) -> None:
        """Take back `_SUCCESS`, but first make sure that a driver which dies here lists again."""
        plan = self._plan
        if plan.listed_to is None:
            plan.relisting = True
            plan.save()
        storage.remove(storage.join(plan.output, SUCCESS))
        plan.generations.append(len(plan.sizes))
        self._begun = True


def redo_failed(plan: Plan, guard: Callable[[], None]) -> None:
    """Order the rows of finished parts whose failure may pass to be labelled again, as their files stand now."""
    finished = set(storage.list_names(plan.output))
    shards = [shard for shard in range(len(plan.sizes)) if part_name(shard) in finished]
    for shard, record in zip(shards, read_records(plan.output, shards), strict=True):
        if record is not None and not set(RETRIED) & set(record.by_status):
            continue
        rows = read_part(plan.part_uri(shard), ["path", "status"]).to_pylist()
        failed = [storage.Entry(row["path"]) for row in rows if row["status"] in RETRIED]
        if failed:
            guard()
            storage.remove(storage.join(plan.output, SUCCESS))
            plan.add_redo(shard, files_table(failed, shard))
