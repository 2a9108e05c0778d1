"""Decoders that crash, hang and eat memory, planted behind real files: each costs its own image and nothing else."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import pyarrow as pa
import pytest
from conftest import IMG_SIZE, encode, red_or_blue, solid
from PIL import Image

from catsdogs.data import decode as decoding
from catsdogs.data import read_and_decode, sandbox
from catsdogs.data.decode import DecodeForInference, view_images
from catsdogs.data.inference import split_into_blocks
from catsdogs.data.sandbox import DecodeRequest, decode_in_subprocess
from catsdogs.images import Preprocessing, decode
from catsdogs.schema import FILES
from catsdogs.start import start_ray

STAGE = DecodeForInference(Preprocessing(img_size=IMG_SIZE), 10**8, batch_size=32)


@pytest.fixture(autouse=True)
def _no_child_is_left():
    """Fork after the test has planted its fault; leave nothing behind."""
    end_child()
    before = set(psutil.Process().children())  # the session's Ray and a proxy's, where other tests ran before
    yield
    end_child()
    assert set(psutil.Process().children()) <= before


def end_child():
    if sandbox._children:
        sandbox._end_child()


def child_pid():
    return sandbox._children[0].pid


def apart(image_bytes, stage=STAGE):
    pixels = np.zeros((IMG_SIZE, IMG_SIZE, 3), np.uint8)
    return decode_in_subprocess(stage, [DecodeRequest(image_bytes, 0, pixels)])[0], pixels


def plant(monkeypatch, fault):
    """Let a decoder do something when it comes to a file that holds b'poison'."""

    def planted(image_bytes, max_pixels):
        if b"poison" in image_bytes:
            fault()
        return decode(image_bytes, max_pixels)

    monkeypatch.setattr(decoding, "decode", planted)


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def eat():
    np.zeros(3 << 30, np.uint8)


def raise_strangely():
    raise KeyError(7)


def test_pixels_come_back_as_they_are_in_this_process():
    for kind in ("JPEG", "PNG", "BMP"):
        image_bytes = encode(solid((200, 20, 30)), kind)
        decoded, pixels = apart(image_bytes)
        assert decoded[:4] == ("ok", None, 40, 36)
        assert np.array_equal(pixels, STAGE.decode(image_bytes, 0).image)


def test_one_child_serves_until_its_decoder_changes():
    apart(red_or_blue("red", 0))
    first = child_pid()
    for i in range(20):
        apart(red_or_blue("red", i))
    assert child_pid() == first
    assert apart(red_or_blue("red", 0), replace(STAGE, max_pixels=3))[0].status == "too_large"
    assert child_pid() != first
    assert not psutil.pid_exists(first)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (segfault, "the decoder died of SIGSEGV"),
        (os.abort, "the decoder died of SIGABRT"),
        (lambda: os._exit(3), "the decoder ended with status 3"),
        (eat, "decoding took more than 2 GiB of memory"),
        (raise_strangely, "the decoder ended with status 1"),
    ],
)
def test_what_kills_a_decoder_costs_that_image(monkeypatch, tmp_path, fault, error):
    plant(monkeypatch, fault)
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(red_or_blue("red", i) + (b"poison" if i == 2 else b""))
    paths = [f"{tmp_path}/{i}.jpg" for i in range(6)]
    files = pa.table({"path": paths, "size_bytes": [None] * 6, "version": [None] * 6}, schema=FILES)
    (rows,) = STAGE(files)
    assert rows["status"].to_pylist() == ["ok", "ok", "decoder_crash", "ok", "ok", "ok"]
    assert rows["error"].to_pylist() == [None, None, error, None, None, None]
    pixels = view_images(rows, IMG_SIZE)
    assert not pixels[2].any()
    assert pixels[3].any()


def test_a_decoder_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_DECODE_S", 0.5)
    plant(monkeypatch, lambda: time.sleep(60))
    began = time.monotonic()
    decoded, _ = apart(red_or_blue("red", 0) + b"poison")
    assert (decoded.status, decoded.error) == ("decoder_crash", "decoding took more than 0.5 s")
    assert time.monotonic() - began < 5
    assert apart(red_or_blue("red", 0))[0].status == "ok"


def test_a_child_that_somebody_kills_costs_no_image():
    apart(red_or_blue("red", 0))
    for _ in range(3):
        os.kill(child_pid(), signal.SIGKILL)
        assert apart(red_or_blue("red", 1))[0].status == "ok"


def test_an_interrupted_block_leaves_no_answer_for_the_next(monkeypatch):
    """Ray cancels a task so; its process lives on, and takes the next one."""
    plant(monkeypatch, lambda: time.sleep(2))

    def interrupt(_signal, _frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_lock", threading.Lock())
    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            apart(encode(solid((20, 30, 200), (50, 20))) + b"poison")
    finally:
        signal.signal(signal.SIGUSR1, before)
    image_bytes = red_or_blue("red", 1)
    for _ in range(2):
        result, pixels = apart(image_bytes)
        assert result[:4] == ("ok", None, 40, 36)
        assert np.array_equal(pixels, STAGE.decode(image_bytes, 0).image)


def test_memory_that_an_image_took_is_there_for_the_next():
    large = encode(Image.new("RGB", (6000, 6000)), "PNG")
    for _ in range(6):
        assert apart(large)[0].status == "ok"


def test_many_images_leave_no_descriptor_open():
    apart(red_or_blue("red", 0))
    before = psutil.Process().num_fds()
    for i in range(5):
        os.kill(child_pid(), signal.SIGKILL)
        apart(red_or_blue("red", i))
    assert psutil.Process().num_fds() == before


def test_the_child_holds_nothing_of_its_parents_and_ends_with_it(tmp_path):
    code = f"""
        import os, socket, time
        from catsdogs.data import sandbox
        from catsdogs.data.decode import DecodeForInference
        from catsdogs.images import Preprocessing
        import numpy as np
        listening = socket.create_server(("127.0.0.1", 0))
        stage = DecodeForInference(Preprocessing(img_size={IMG_SIZE}), 10**8, 32)
        sandbox.decode_in_subprocess(stage, [sandbox.DecodeRequest(b"text", 0, np.zeros((1, 1, 3), np.uint8))])
        print(sandbox._children[0].pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.num_fds() == 4  # the standard ones, and its end of the pipe
    parent.kill()
    parent.communicate()
    child.wait(timeout=5)


@dataclass(frozen=True)
class Stateless:
    """A decoder that tells in which process it runs."""

    seen: tuple = field(default=())

    def decode(self, image_bytes, row):
        return decode(b"%d %d" % (os.getpid(), row))


def test_a_file_larger_than_a_decode_may_be_is_not_read(tmp_path):
    with (tmp_path / "vast.tif").open("wb") as file:
        file.truncate(5 << 30)
    (tmp_path / "x.jpg").write_bytes(red_or_blue("red", 1))
    paths = [f"{tmp_path}/vast.tif", f"{tmp_path}/x.jpg"] * 2
    sizes = [5 << 30, None, None, None]  # a manifest knows none
    (rows,) = STAGE(pa.table({"path": paths, "size_bytes": sizes, "version": [None] * 4}, schema=FILES))
    assert rows["status"].to_pylist() == ["decoder_crash", "ok"] * 2
    assert rows["size_bytes"].to_pylist()[0] == 5 << 30
    assert "more than the 2048 MiB" in rows["error"][0].as_py()


def test_files_that_do_not_fit_together_are_read_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "READ_BYTES", 1500)
    asked, original = [], decoding.decode_in_subprocess
    monkeypatch.setattr(decoding, "decode_in_subprocess", lambda *args: asked.append(len(args[1])) or original(*args))
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(red_or_blue("red", i))
    paths = [f"{tmp_path}/{i}.jpg" for i in range(6)]
    sizes = [(tmp_path / f"{i}.jpg").stat().st_size for i in range(6)]
    (rows,) = STAGE(pa.table({"path": paths, "size_bytes": sizes, "version": [None] * 6}, schema=FILES))
    assert rows["status"].to_pylist() == ["ok"] * 6
    assert sum(asked) == 6
    assert len(asked) > 2
    assert [view_images(rows, IMG_SIZE)[i].any() for i in range(6)] == [True] * 6


def test_the_number_of_the_row_reaches_the_decoder():
    (decoded,) = decode_in_subprocess(Stateless(), [DecodeRequest(b"x", 41, np.zeros((1, 1, 3), np.uint8))])
    assert str(child_pid())[:5] in decoded.error
    assert os.getpid() != child_pid()


def test_a_block_comes_out_in_the_batches_that_a_model_sees(ray_cluster, tmp_path):
    for i in range(21):
        (tmp_path / f"{i:02d}.jpg").write_bytes(red_or_blue("red", i))
    paths = [f"{tmp_path}/{i:02d}.jpg" for i in range(21)]
    files = pa.table({"path": paths, "size_bytes": [None] * 21, "version": [None] * 21}, schema=FILES)
    assert [block.num_rows for block in split_into_blocks(files, 8)] == [21]
    start_ray()
    decoded = read_and_decode(files, replace(STAGE, batch_size=8), num_cpus=1)
    batches = decoded.map_batches(lambda rows: {"paths": [",".join(rows["path"])]}, batch_size=None).take_all()
    assert [row["paths"].split(",") for row in batches] == [paths[:8], paths[8:16], paths[16:]]
    assert [block.num_rows for block in split_into_blocks(pa.concat_tables([files] * 30), 100)] == [200, 200, 200, 30]
