"""Stage 1, list: `--input` -> the plan. New files become new shards; rows of changed files are scored again.

A first listing is compared with an empty plan. A folder is listed, and the plan read, in the order of `sort_key`, so
memory does not grow with the number of files; a path list is sorted in memory, unless its paths ascend.

Manifests are written concurrently. `_plan.json` is saved when they are there, after each shard of a small plan, else
when 1% is new: it has the size of every shard, so that saving it for each would be quadratic. An interrupted listing
resumes where the plan was saved last, and overwrites the manifests that follow; it starts again if there is a
`--limit`. So only shards of the saved plan may be scored while a listing runs (`background.py`), and none if there is
a `--limit`.
"""

import heapq
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Self

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError
from catsdogs.lease import LeaseClaim
from catsdogs.path_lists import PathList, is_path_list
from catsdogs.progress import Message, Progress
from catsdogs.schema import parquet_bytes
from catsdogs.score.plan import SUCCESS, Plan, build_files_table, read_files
from catsdogs.score.threads import GRACE_S, WritePool, map_in_threads

SAVE_EVERY = 0.01  # of the shards of the plan
MANIFEST_READERS = 4  # threads, for all listings of a plan together; each reads up to two manifests ahead


def has_images(config: ScoreConfig) -> bool:
    """Return whether the input is a folder with images, at the first one; InputError if it cannot be listed."""
    return not is_path_list(config.input) and any(True for _ in storage.Listing(config.input, collect_folders=False))


def sort_key(path: str) -> bytes:
    """Return the raw bytes of a path, by which listings are ordered; those of a `file://` URI are unquoted."""
    return storage.local_path(path) if path.startswith("file://") else path.encode()


def _read_path_list(config: ScoreConfig, start_after: str) -> Iterator[storage.Entry]:
    """Read a path list; yield the files after a path in the order of `sort_key`, each once."""
    paths: Iterable[str] = PathList(config.input, config.allow_schemes)
    if not all(sort_key(previous) < sort_key(current) for previous, current in pairwise(paths)):
        paths = sorted(set(paths), key=sort_key)
    return (storage.Entry(path) for path in paths if sort_key(path) > sort_key(start_after))


class PlannedFile(NamedTuple):
    """A file of the plan."""

    key: bytes
    path: str
    size_bytes: int | None
    version: str | None
    shard: int

    def differs(self, entry: storage.Entry) -> bool:
        """Return whether the file has changed. A path list has no sizes and versions, which are then not compared."""
        sizes, versions = (self.size_bytes, entry.size_bytes), (self.version, entry.version)
        return any(listed is not None and listed != planned for planned, listed in (sizes, versions))


def iter_planned_files(plan: Plan, num_shards: int) -> Iterator[PlannedFile]:
    """Iterate over the files of the first shards of a plan in the order of `sort_key`."""
    starts = [start for start in plan.listing_first_shards if start < num_shards]
    readers = MANIFEST_READERS // max(1, len(starts))
    return heapq.merge(*(_iter_shards(plan, first, end, readers) for first, end in pairwise([*starts, num_shards])))


def _iter_shards(plan: Plan, first: int, end: int, num_readers: int) -> Iterator[PlannedFile]:
    """Iterate over the files of shards, with so many threads that read manifests ahead."""
    uris = map(plan.manifest_uri, range(first, end))
    manifests = map_in_threads(read_files, uris, num_readers) if num_readers else map(read_files, uris)
    for shard, files in enumerate(manifests, first):
        columns = (files[name].to_pylist() for name in ("path", "size_bytes", "version"))
        for path, size_bytes, version in zip(*columns, strict=True):
            yield PlannedFile(sort_key(path), path, size_bytes, version, shard)


class PlanUpdate:
    """Compares one listing of the input with the plan, and saves the differences.

    A `with` block waits at its end for the writes that run, and no other begins: a thread may call `run`, and be left
    behind when the block ends.
    """

    def __init__(self, plan: Plan, config: ScoreConfig, lease: LeaseClaim, progress: Progress) -> None:
        self._plan = plan
        self._config = config
        self._lease = lease
        self._progress = progress
        self._new: list[storage.Entry] = []
        self._changed: dict[int, list[storage.Entry]] = defaultdict(list)
        self._num_changed = 0
        self._num_unsaved = 0  # shards, or lists of changed files, that the saved plan does not cover
        self._writes = WritePool()
        self._is_stopped = False
        self._stop_lock = threading.Lock()  # held while something is saved

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        with storage.limit_retries(GRACE_S), self._stop_lock:
            self._is_stopped = True
        self._writes.__exit__(*error)

    def run(self) -> None:
        """List the input and save what is new; write nothing if nothing is.

        A complete plan that is not scored yet is not listed again; with `retry_failed`, no complete plan is.
        InputError if the input cannot be listed or has no images.
        """
        plan = self._plan
        is_listed = plan.listing_cursor is None and plan.sizes and not plan.relisting
        succeeded = storage.read_versioned(storage.join(plan.output, SUCCESS)) is not None
        if not is_listed or (succeeded and not self._config.retry_failed):
            self._list()

    def _restore(self) -> None:
        """Restore the state of an interrupted listing, if there is one."""
        plan = self._plan
        self._has_started = plan.listing_cursor is not None and bool(plan.listing_first_shards)
        if self._has_started and self._config.limit is not None:  # how many files precede the cursor is unknown
            del plan.sizes[plan.listing_first_shards[-1] :]
            plan.listing_cursor = ""
        self._other_files = Counter(plan.other_files if plan.listing_cursor else {})  # before the cursor
        num_shards = plan.listing_first_shards[-1] if self._has_started else len(plan.sizes)  # before this listing
        self._planned = iter_planned_files(plan, num_shards)
        self._next_planned = next(self._planned, None)

    def _list(self) -> None:
        self._restore()
        plan = self._plan
        source, start_after = self._config.input, plan.listing_cursor or ""
        listing = storage.Listing(source, self._progress, start_after=start_after, collect_folders=False)
        entries = _read_path_list(self._config, start_after) if is_path_list(source) else listing
        for entry in itertools.islice(entries, self._config.limit):
            self._compare(entry)
            if max(len(self._new), self._num_changed) >= self._config.shard_size:
                plan.other_files = dict(self._other_files + listing.other_files)
                self._save(entry.path)
            if self._is_stopped:
                return
        for path, reason in listing.unlisted.items():
            self._progress(Message(f"could not list {path}: {reason}"))
        if not plan.sizes and not self._new:
            if is_path_list(source):
                raise InputError(f"no images under {source}: the path list is empty; check --input")
            is_folder_of_lists = ".parquet" in listing.other_files
            hint = "; a folder of path lists needs a name that ends in .parquet" if is_folder_of_lists else ""
            raise InputError(
                f"no images under {source}: {listing.describe_other_files()}; "
                f"expected names that end in {' '.join(storage.EXTENSIONS)}{hint}; check --input"
            )
        plan.other_files = dict(self._other_files + listing.other_files)
        if self._new or self._changed or self._has_started or plan.relisting or listing.unlisted != plan.unlisted:
            plan.unlisted = listing.unlisted
            self._save(None)

    def _compare(self, entry: storage.Entry) -> None:
        key = sort_key(entry.path)
        while self._next_planned is not None and self._next_planned.key < key:
            self._next_planned = next(self._planned, None)
        if self._next_planned is None or self._next_planned.key > key:
            self._new.append(entry)
        elif self._next_planned.differs(entry):
            self._changed[self._next_planned.shard].append(entry)
            self._num_changed += 1

    def _save(self, listing_cursor: str | None) -> None:
        """Write the differences found so far, and save the plan if it is time."""
        with self._stop_lock:
            if not self._is_stopped:
                self._save_unless_stopped(listing_cursor)

    def _save_unless_stopped(self, listing_cursor: str | None) -> None:
        plan = self._plan
        if not self._has_started:
            self._start()
        self._write_changed()
        if self._new:
            shard = len(plan.sizes)
            manifest = parquet_bytes(build_files_table(self._new, shard))
            self._writes.submit(len(manifest), self._lease.write, plan.manifest_uri(shard), manifest)
            plan.sizes.append(len(self._new))
        self._new, self._changed, self._num_changed = [], defaultdict(list), 0
        self._num_unsaved += 1
        if listing_cursor is None or self._num_unsaved >= SAVE_EVERY * len(plan.sizes):
            self._save_plan(listing_cursor)

    def _write_changed(self) -> None:
        if self._changed:
            self._writes.wait()  # an earlier request for the same part: both read the file, and add their rows
        for shard, entries in self._changed.items():
            files = build_files_table(entries, shard)
            self._writes.submit(files.nbytes, self._plan.request_rescore, shard, files, self._lease)

    def _save_plan(self, listing_cursor: str | None) -> None:
        plan = self._plan
        self._writes.wait()  # the saved plan covers only what is written
        self._lease.check()
        if listing_cursor is None and plan.listing_first_shards[-1] == len(plan.sizes):
            plan.listing_first_shards.pop()
        plan.listing_cursor = listing_cursor
        plan.relisting = listing_cursor is not None
        plan.save()
        self._num_unsaved = 0

    def _start(self) -> None:
        """Mark the listing as unfinished in the plan, then remove `_SUCCESS`."""
        plan = self._plan
        self._lease.check()
        if plan.listing_cursor is None:
            plan.relisting = True
            plan.save()
        storage.remove(storage.join(plan.output, SUCCESS))
        plan.listing_first_shards.append(len(plan.sizes))
        self._has_started = True
