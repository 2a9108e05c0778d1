"""Ranges of an S3 prefix that are listed at once: every key once, in order, whatever the keys and the boundaries."""

import bisect
import random
import time

import pytest

from catsdogs.errors import RunError
from catsdogs.storage import s3_ranges
from catsdogs.storage.s3_ranges import list_objects_in_ranges

PAGE_KEYS = 3
ALPHABETS = {
    "digits": "0123456789",
    "letters and folders": "ab/Z",
    "edges of what has a successor": " ~}\x7f/",
    "other characters": "aé中\uffff😀\U0010ffff",
}


class Store:
    """Lists keys in pages that arrive in any order; some requests fail."""

    def __init__(self, keys):
        self.keys = sorted(keys, key=str.encode)
        self.random = random.Random(0)
        self.running = self.max_running = self.num_pages = 0
        self.failing = None  # a key whose page fails
        self.skips_folders = False  # as SeaweedFS does

    def list_object_pages(self, uri, bucket, prefix, start_after=""):
        start = bisect.bisect_right(self.keys, start_after.encode(), key=str.encode)
        while self.skips_folders and start < len(self.keys) and self.keys[start].startswith(f"{start_after}/"):
            start += 1
        while True:
            page = self.keys[start : start + PAGE_KEYS]
            self._wait()
            if self.failing in page:
                raise RunError(f"no {self.failing}")
            yield [{"Key": key, "Size": 1, "LastModified": None} for key in page]
            start += PAGE_KEYS
            if start >= len(self.keys):
                return
            if self.random.random() < 0.1:
                yield []

    def _wait(self):
        self.num_pages, self.running = self.num_pages + 1, self.running + 1
        self.max_running = max(self.max_running, self.running)
        time.sleep(self.random.random() / 1000)
        self.running -= 1

    def list(self, start_after=""):
        return [item["Key"] for item in list_objects_in_ranges("s3://b/in", "b", "in/", start_after)]


@pytest.fixture
def build_store(monkeypatch):
    monkeypatch.setattr(s3_ranges, "FIRST_PAGES", 2)
    monkeypatch.setattr(s3_ranges, "LONG_PAGES", 3)

    def build(keys):
        store = Store(keys)
        monkeypatch.setattr(s3_ranges, "list_object_pages", store.list_object_pages)
        return store

    return build


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
@pytest.mark.parametrize("max_ready_pages", [1, 128])
def test_every_key_is_listed_once_and_in_order(alphabet, max_ready_pages, build_store, monkeypatch):
    monkeypatch.setattr(s3_ranges, "MAX_READY_PAGES", max_ready_pages)
    draw = random.Random(alphabet)
    for num_keys in (0, 1, PAGE_KEYS, 50, 300):
        keys = {"in/" + "".join(draw.choices(alphabet, k=draw.randrange(1, 9))) for _ in range(num_keys)}
        store = build_store(keys)
        assert store.list() == store.keys
        start_after = draw.choice(store.keys or ["in/"]) + draw.choice(["", "0"])
        assert store.list(start_after) == [key for key in store.keys if key.encode() > start_after.encode()]


def test_a_store_that_skips_the_folder_after_which_a_range_begins_loses_no_key(build_store):
    draw = random.Random(0)
    for _ in range(10):
        store = build_store({"in/" + "".join(draw.choices("ab~/", k=draw.randrange(1, 9))) for _ in range(300)})
        store.skips_folders = True
        assert store.list() == store.keys


def test_ranges_are_listed_at_once_and_hardly_a_page_twice(build_store):
    store = build_store(f"in/{i:06}" for i in range(1000))
    assert store.list() == store.keys
    assert 1 < store.max_running <= s3_ranges.MAX_REQUESTS
    assert store.num_pages < 2 * len(store.keys) / PAGE_KEYS  # measured: 1.5 times, with 10% empty ones


def test_only_a_few_pages_wait_for_those_before_them(build_store, monkeypatch):
    monkeypatch.setattr(s3_ranges, "MAX_READY_PAGES", 10)
    store = build_store(f"in/{i:06}" for i in range(1000))
    items = list_objects_in_ranges("s3://b/in", "b", "in/")
    first = [next(items)["Key"] for _ in range(100)]
    time.sleep(0.1)
    assert first == store.keys[:100]
    assert store.num_pages <= 100 / PAGE_KEYS + 1 + 10 + s3_ranges.MAX_REQUESTS + 10


def test_the_error_of_a_page_is_raised_after_the_keys_before_it(build_store):
    store = build_store(f"in/{i:06}" for i in range(1000))
    store.failing = "in/000333"
    found = []
    with pytest.raises(RunError, match="no in/000333"):
        found.extend(item["Key"] for item in list_objects_in_ranges("s3://b/in", "b", "in/"))
    assert found[:300] == store.keys[:300]
