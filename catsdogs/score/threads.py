"""Run requests of the driver on threads: a store answers each in tens of milliseconds.

The number of calls that run or wait is bounded, so memory does not grow with the number of shards.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Self, TypeVar

from catsdogs import storage

MAX_WRITES = 32  # at once; 3 requests of 50 ms for each part are 200 parts/s
MAX_WRITE_BYTES = 256 << 20  # of all content that is being written; one larger write is alone
MAX_READS = 32  # at once
GRACE_S = 10.0  # of writes that fail and are retried while an interrupted command waits for them
T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def map_in_threads(function: Callable[[T], R], items: Iterable[T], num_threads: int = MAX_READS) -> Iterator[R]:
    """Yield the result for each item in order; at most twice as many calls as threads run, or wait to be yielded."""
    calls: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="map") as threads:
        try:
            for item in items:
                calls.append(threads.submit(function, item))
                if len(calls) == 2 * num_threads:
                    yield calls.popleft().result()
            while calls:
                yield calls.popleft().result()
        finally:
            for call in calls:
                call.cancel()


class WritePool:
    """Writes of a `with` block that run concurrently. Only the thread that owns the pool calls its methods.

    An error of a write is raised by the next `submit` or `wait`. No write runs any more when the block has ended, also
    if an exception or Ctrl-C ends it; then failed requests are retried for GRACE_S only.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_WRITES, thread_name_prefix="write")
        self._running: dict[Future[None], int] = {}  # with the size of each
        self.num_done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_class: type[BaseException] | None, *_: object) -> None:
        try:
            if error_class is None:
                self.wait()
        finally:
            with storage.limit_retries(GRACE_S):
                self._threads.shutdown()
            for write in self._running:
                if error := write.exception():
                    logger.debug("a write failed, too", exc_info=error)

    def submit(self, num_bytes: int, write: Callable[..., None], *arguments: Any) -> None:
        """Start a write of about this size, as soon as there is room for it."""
        self._collect([running for running in self._running if running.done()])
        while self._running and not self._has_room(num_bytes):
            self._collect(wait(self._running, return_when=FIRST_COMPLETED).done)
        self._running[self._threads.submit(write, *arguments)] = num_bytes

    def wait(self) -> None:
        """Wait until no write runs."""
        self._collect(wait(self._running).done)

    def _has_room(self, num_bytes: int) -> bool:
        return len(self._running) < MAX_WRITES and sum(self._running.values()) + num_bytes <= MAX_WRITE_BYTES

    def _collect(self, done: Collection[Future[None]]) -> None:
        for write in done:
            del self._running[write]
            write.result()
            self.num_done += 1
