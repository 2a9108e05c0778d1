"""List a large S3 prefix in ranges of keys, several at once; the keys are yielded in order.

A store answers a page of 1,000 keys in 50 ms or more, and names the next page only then. After FIRST_PAGES pages, a
range is split behind the last key that it has listed: at the end of the keys that begin as that one does. The new range
lists the keys after this boundary. A range keeps the boundary itself, and the next one lists what is greater, so every
key is in one range whatever the boundary. How many characters are compared depends on the keys seen before: as many as
FIRST_PAGES pages had in common, more if a range becomes long, fewer if it has less than a page.

Not every store lists what is greater. If the boundary `in/b` is a folder, SeaweedFS 4.48 begins behind `in/b/...`. So a
range must begin with the key that the range before it saw next; if it does not, the listing of that range continues.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from catsdogs.storage.event_loop import call_in_thread
from catsdogs.storage.s3_listing import list_object_pages

FIRST_PAGES = 5  # before a range is split; a shorter listing is one range
LONG_PAGES = 10  # after which a range is split at a longer prefix
MAX_REQUESTS = 8  # at once
MAX_RANGES = 32
MAX_READY_PAGES = 128  # that wait for those before them; 60 MB
LAST_CHAR = "~"  # of a boundary: plain, seldom the end of a folder's name, and after most keys of the prefix before it
ITEM_NAMES = ("Key", "Size", "ETag")
Item = dict[str, Any]


def list_objects_in_ranges(uri: str, bucket: str, prefix: str, start_after: str = "") -> Iterator[Item]:
    """List every object under a prefix as `list_objects` does."""
    ranges = [_Range(uri, bucket, prefix, start_after)]
    while ranges:
        first = ranges[0]
        _request_pages(ranges)
        if first.ready:
            yield from first.ready.popleft()
        elif first.is_listed:
            del ranges[0]
            if ranges:
                ranges[0].follow(first)
        elif first.error is not None:  # that of another range waits for its turn
            raise first.error
        else:
            wait([one.request for one in ranges if one.request], return_when=FIRST_COMPLETED)
        for one in ranges:
            one.receive()
        _split_first_that_can(ranges)


def _request_pages(ranges: list["_Range"]) -> None:
    """Request the next page of the ranges that come first."""
    num_requests = sum(one.request is not None for one in ranges)
    num_ready = sum(len(one.ready) for one in ranges)
    for one in ranges:
        has_room = one is ranges[0] or num_ready + num_requests < MAX_READY_PAGES
        if one.can_continue and one.request is None and has_room and num_requests < MAX_REQUESTS:
            one.request = call_in_thread(next, one.pages, None)
            num_requests += 1


def _split_first_that_can(ranges: list["_Range"]) -> None:
    for i, one in enumerate(ranges if len(ranges) < MAX_RANGES else ()):
        if one.can_continue and (after := one.split()):
            ranges.insert(i + 1, after)
            return


class _Range:
    """The keys after one, up to and including `end`.

    Attributes:
        ready: pages that are not yielded yet.
        rest: the keys after `end` of the last page.
        error: that of its last request.
    """

    def __init__(self, uri: str, bucket: str, prefix: str, after: str) -> None:
        self._source = (uri, bucket, prefix)
        self.pages = list_object_pages(uri, bucket, prefix, after)
        self.request: Future[list[Item] | None] | None = None
        self.ready: deque[list[Item]] = deque()
        self.rest: list[Item] = []
        self.is_listed = False
        self.error: BaseException | None = None
        self._start_key: str | None = None  # the first key that it has listed
        self._before: _Range | None = None  # until it is known that this range begins where that one ended
        self._end: str | None = None
        self._num_pages = 0  # since it began or was split
        self._first_key = self._last_key = ""  # of these pages
        self._prefix_chars: int | None = None  # of the prefix at whose end it is split; None while it is unknown
        self._is_new = False  # its first page is to be split, too

    @property
    def can_continue(self) -> bool:
        """Whether it may have more pages."""
        return not self.is_listed and self.error is None

    def receive(self) -> None:
        """Take the page that was requested if it is there."""
        if self.request is None or not self.request.done():
            return
        request, self.request = self.request, None
        self.error = request.exception()
        if self.error is None:
            self._add_page(request.result())
            self._check_start()

    def follow(self, before: "_Range") -> None:
        """Check that the range begins where the one before it, which is listed, ended; else continue its listing."""
        self._before = before
        self._check_start()

    def _check_start(self) -> None:
        if self._before is None or self.error or (self._start_key is None and not self.is_listed):
            return
        before, self._before = self._before, None
        if before.rest and before.rest[0]["Key"] != self._start_key:
            self.pages, self.request, self.rest = before.pages, None, []
            self.ready.clear()
            self._add_page(before.rest)

    def _add_page(self, page: list[Item] | None) -> None:
        self.is_listed = page is None
        if not page:
            return
        self._start_key = self._start_key or page[0]["Key"]
        if self._num_pages == 0:
            self._first_key = page[0]["Key"]
        self._last_key, self._num_pages = page[-1]["Key"], self._num_pages + 1
        if self._end is not None and self._last_key > self._end:
            self.rest = [item for item in page if item["Key"] > self._end]
            page, self.is_listed = page[: len(page) - len(self.rest)], True
        self.ready.append([{name: item[name] for name in ITEM_NAMES if name in item} for item in page])

    def split(self) -> "_Range | None":
        """Split the range after its last key if it is time; return the keys after the boundary."""
        num_chars = self._find_prefix_chars()
        if num_chars is None:
            return None
        num_chars = max(num_chars, len(self._source[2]) + 1)
        boundary = self._last_key[:num_chars] + LAST_CHAR
        if boundary < self._last_key or (self._end is not None and boundary >= self._end):
            self._prefix_chars, self._num_pages, self._is_new = None, 0, False
            return None
        after = _Range(*self._source, boundary)
        after._end, after._prefix_chars, after._is_new = self._end, num_chars, True
        self._end, self._prefix_chars, self._num_pages, self._is_new = boundary, num_chars, 1, False
        return after

    def _find_prefix_chars(self) -> int | None:
        """Return the length of the prefix at whose end to split; None if it is not time to split."""
        pairs = zip(self._first_key, self._last_key, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._prefix_chars is None:
            return common if self._num_pages >= FIRST_PAGES else None
        if self._is_new:
            return min(self._prefix_chars, common) if self._num_pages else None
        return self._prefix_chars + 1 if self._num_pages >= LONG_PAGES else None
