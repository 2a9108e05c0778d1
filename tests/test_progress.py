"""A line says what is waited for while there is no progress."""

import threading
import time

import pytest

from catsdogs import progress
from catsdogs.progress import Message, StageProgress, StallReporter


@pytest.fixture(autouse=True)
def _short_stalls(monkeypatch):
    monkeypatch.setattr(progress, "STALL_S", 0.01)
    monkeypatch.setattr(progress, "STALL_POLL_S", 0.001)


class Events(list):
    """Collects events; `arrived` is set by each message."""

    def __init__(self):
        self.arrived = threading.Event()

    def __call__(self, event):
        self.append(event)
        if isinstance(event, Message):
            self.arrived.set()

    def wait(self):
        self.arrived.clear()
        assert self.arrived.wait(timeout=60)


def test_a_wait_for_the_next_batch_is_reported_again_and_again():
    events = Events()

    def iter_batches():
        yield 1
        events.wait()
        events.wait()
        yield 2

    with StallReporter(events, lambda: "waiting for a GPU") as stalls:
        assert list(stalls.watch(iter_batches())) == [1, 2]
    assert {event.text.partition(": ")[2] for event in events} == {"waiting for a GPU"}
    assert events[0].text.startswith("no progress for 0 s: ")


def test_the_time_that_a_caller_spends_on_a_batch_is_no_wait():
    events = Events()
    with StallReporter(events, lambda: "waiting") as stalls:
        for _ in stalls.watch([1]):
            time.sleep(0.1)
    assert events == []


def test_events_are_passed_on_and_a_wait_for_the_next_is_reported():
    events = Events()
    with StallReporter(events, lambda: "waiting for workers") as stalls:
        stalls(StageProgress("train", 1, 2))
        events.wait()
    assert events[0] == StageProgress("train", 1, 2)
    assert events[1].text.endswith(": waiting for workers")
