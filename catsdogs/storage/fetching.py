"""Read the files of a task: groups of files in order, remote ones concurrently and ahead of their use.

The memory of a task is limited: at most `MAX_AHEAD_BYTES` and one more group. The size of a file that was not
listed is assumed. One that is larger is not read ahead; it is read when its turn comes, and returned alone.

How long a task waits for its files is limited, too: after `DEADLINE_S` in all, the files that have not arrived get the
status `read_error`. The time in which the caller decodes what it received does not count.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from catsdogs.storage import limits
from catsdogs.storage.entries import Entry
from catsdogs.storage.event_loop import submit
from catsdogs.storage.limits import MAX_FILE_BYTES, TooLongError
from catsdogs.storage.reading import Fetched, fetch_local, fetch_remote
from catsdogs.storage.uris import is_local

MAX_READS_IN_FLIGHT = 32  # per process; S3 responds to a GET in tens of milliseconds
MAX_AHEAD_BYTES = 256 << 20  # read before the caller needs them
UNLISTED_BYTES = 4 << 20  # the assumed size of a file that was not listed
MAX_UNLISTED_BYTES = 16 << 20  # of a file that is read ahead without a listed size


def fetch(entries: Sequence[Entry], limit_bytes: int = MAX_FILE_BYTES) -> list[Fetched]:
    """Read listed files, remote ones concurrently.

    Args:
        limit_bytes: a larger file is not read; its status is `too_large`.
    """
    return _Group(entries, limit_bytes, limit_bytes).wait(_Patience())


def fetch_ahead(
    groups: Iterable[Sequence[Entry]], limit_bytes: int = MAX_FILE_BYTES
) -> Generator[list[Fetched], None, None]:
    """Read groups of files in order, and remote files of the next groups ahead, up to `MAX_AHEAD_BYTES`.

    While a group waits for its slowest file, the next groups are read. A list that is returned has the files of one
    group, or some of them if one is large and was not listed.
    """
    remaining, patience = iter(groups), _Patience()
    in_flight: deque[_Group] = deque()
    try:
        while True:
            while sum(group.num_bytes for group in in_flight) < MAX_AHEAD_BYTES:
                entries = next(remaining, None)
                if entries is None:
                    break
                in_flight.append(_Group(entries, limit_bytes, MAX_UNLISTED_BYTES))
            if not in_flight:
                return
            yield from in_flight[0].iter_files(patience)
            in_flight.popleft()
    finally:
        for group in in_flight:
            group.cancel()


def listed_bytes(entry: Entry) -> int:
    """Return the listed size of a file, or an estimate if it was not listed."""
    return UNLISTED_BYTES if entry.size_bytes is None else entry.size_bytes


class _Patience:
    """The time that a task may still wait for its files."""

    def __init__(self) -> None:
        self.left_s = limits.DEADLINE_S


class _Group:
    """Files that are read together: remote ones from the start, local ones in `wait`.

    Args:
        limit_bytes: a larger file is not read.
        ahead_bytes: a larger file without a listed size is read alone.
    """

    def __init__(self, entries: Sequence[Entry], limit_bytes: int, ahead_bytes: int) -> None:
        self._entries = entries
        self._limit_bytes = limit_bytes
        self._ahead_bytes = min(ahead_bytes, limit_bytes)
        self.num_bytes = sum(map(listed_bytes, entries))
        self._reads: dict[int, Future[Fetched]] = {
            i: submit(_fetch_in_turn, entry, self._limit(entry))
            for i, entry in enumerate(entries)
            if not is_local(entry.path) and not self._is_too_large(entry)
        }

    def iter_files(self, patience: _Patience) -> Iterator[list[Fetched]]:
        """Wait for the files; one that is read alone is returned in a separate list."""
        together: list[Fetched] = []
        for entry, file in zip(self._entries, self.wait(patience), strict=True):
            if file.status != "too_large" or self._limit(entry) == self._limit_bytes:
                together.append(file)
                continue
            if together:
                yield together
            together = []
            yield _Group([entry], self._limit_bytes, self._limit_bytes).wait(patience)
        if together:
            yield together

    def wait(self, patience: _Patience) -> list[Fetched]:
        """Wait for the files as long as the task may."""
        started_s = time.monotonic()
        try:
            for read in wait(self._reads.values(), patience.left_s, FIRST_EXCEPTION).done:
                read.result()  # raises what stops the job
            ends_s = started_s + patience.left_s
            return [self._take(i, entry, ends_s) for i, entry in enumerate(self._entries)]
        finally:
            patience.left_s = max(0.0, patience.left_s - (time.monotonic() - started_s))
            self.cancel()

    def cancel(self) -> None:
        for read in self._reads.values():
            read.cancel()

    def _limit(self, entry: Entry) -> int:
        return self._ahead_bytes if entry.size_bytes is None else self._limit_bytes

    def _is_too_large(self, entry: Entry) -> bool:
        return entry.size_bytes is not None and entry.size_bytes > self._limit_bytes

    def _take(self, i: int, entry: Entry, ends_s: float) -> Fetched:
        if self._is_too_large(entry):
            return Fetched("too_large", error=str(TooLongError(listed_bytes(entry), self._limit_bytes)))
        if i in self._reads and self._reads[i].done():
            return self._reads[i].result()
        if i in self._reads or time.monotonic() > ends_s:
            reason = f"not read in time: the files of a task took more than {limits.DEADLINE_S:g} s"
            return Fetched("read_error", error=reason)
        return fetch_local(entry, self._limit(entry))


@functools.cache  # a semaphore belongs to one event loop; a forked process gets a new loop
def _read_semaphore(_: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return asyncio.Semaphore(MAX_READS_IN_FLIGHT)


async def _fetch_in_turn(entry: Entry, limit_bytes: int) -> Fetched:
    async with _read_semaphore(asyncio.get_running_loop()):
        return await fetch_remote(entry, limit_bytes)
