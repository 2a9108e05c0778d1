"""Batches of slow images: each ends long before Ray Data ends the run, and its rows name the limit."""

import mmap
import os
import signal
import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from conftest import IMG_SIZE, red_or_blue

from catsdogs.data import decode as decoding
from catsdogs.data import decode_budget, sandbox
from catsdogs.data.decode import DecodeForInference
from catsdogs.data.decode_budget import DecodeBudget
from catsdogs.data.decode_messages import DecodeRequest
from catsdogs.data.runtime import NO_PROGRESS_TIMEOUT_S
from catsdogs.data.sandbox import decode_in_subprocess
from catsdogs.images import Preprocessing, decode_image
from catsdogs.schema import FILES

NUM_FILES = 20
STAGE = DecodeForInference(Preprocessing(img_size=IMG_SIZE), 10**8, batch_size=NUM_FILES)
LATE = "decoding took more than 0.05 s, the limit for each further image of a batch whose slow images took 1 s"


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch):
    sandbox.end_child()
    monkeypatch.setattr(decode_budget, "MAX_DECODE_S", 0.3)
    monkeypatch.setattr(decode_budget, "MAX_BATCH_DECODE_S", 2.0)
    yield
    sandbox.end_child()


def plant_delay(monkeypatch, seconds):
    def slow(image_bytes, max_pixels):
        time.sleep(seconds)
        return decode_image(image_bytes, max_pixels)

    monkeypatch.setattr(decoding, "decode_image", slow)


def decode_batch(tmp_path, monkeypatch, seconds, read_bytes=1 << 20):
    """Decode NUM_FILES slow files as one batch, which may be read and sent in several groups."""
    plant_delay(monkeypatch, seconds)
    monkeypatch.setattr(decoding, "READ_BYTES", read_bytes)
    for i in range(NUM_FILES):
        (tmp_path / f"{i:02d}.jpg").write_bytes(red_or_blue("red", i))
    paths = [tmp_path / f"{i:02d}.jpg" for i in range(NUM_FILES)]
    sizes = [path.stat().st_size for path in paths]
    columns = {"path": list(map(str, paths)), "size_bytes": sizes, "version": [None] * NUM_FILES}
    (rows,) = STAGE(pa.table(columns, schema=FILES))
    return list(zip(rows["status"].to_pylist(), rows["error"].to_pylist(), strict=True))


@pytest.mark.parametrize("num_files", [1, 5, 32, 256, 4096])
def test_a_batch_of_images_that_hang_ends_in_half_of_the_time(monkeypatch, num_files):
    monkeypatch.undo()
    budget, total_s = DecodeBudget.for_batch(num_files), 0.0
    for _ in range(num_files):
        taken_s = budget.wait_s  # of an image that switches the child's timer off
        total_s += taken_s
        budget.charge(taken_s, num_files=1)
    assert total_s < NO_PROGRESS_TIMEOUT_S / 2


@pytest.mark.parametrize("num_files", [32, 256])
def test_images_within_their_share_are_never_limited(num_files):
    budget = DecodeBudget.for_batch(num_files)
    for _ in range(num_files):
        budget.charge(budget.share_s, num_files=1)
    assert not budget.is_spent


@pytest.mark.parametrize("read_bytes", [1 << 20, 1500])
def test_images_that_hang_share_the_budget_of_their_batch(tmp_path, monkeypatch, read_bytes):
    rows = decode_batch(tmp_path, monkeypatch, seconds=60, read_bytes=read_bytes)
    num_full = rows.count(("decoder_crash", "decoding took more than 0.3 s"))
    assert 1 <= num_full <= 4
    assert rows[num_full:] == [("decoder_crash", LATE)] * (NUM_FILES - num_full)


def test_slow_images_that_succeed_count_and_are_kept(tmp_path, monkeypatch):
    rows = decode_batch(tmp_path, monkeypatch, seconds=0.2)
    num_ok = rows.count(("ok", None))
    assert 1 <= num_ok <= 8
    assert rows[:num_ok] == [("ok", None)] * num_ok
    assert rows[num_ok:] == [("decoder_crash", LATE)] * (NUM_FILES - num_ok)


@dataclass(frozen=True)
class Counting:
    """A decoder that counts its calls for each row in shared memory, and dies at one row."""

    calls: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, NUM_FILES))

    def decode(self, _, row):
        self.calls[row] += 1
        if row == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode_image(b"")


def test_a_file_that_kills_the_child_is_tried_twice_and_others_once():
    decoder = Counting()
    pixels = np.zeros((NUM_FILES, 1, 1, 3), np.uint8)
    results = decode_in_subprocess(decoder, [DecodeRequest(b"x", i, pixels[i]) for i in range(NUM_FILES)])
    assert [result.status for result in results] == ["empty"] * 5 + ["decoder_crash"] + ["empty"] * 14
    assert list(decoder.calls[:NUM_FILES]) == [1] * 5 + [2] + [1] * 14
