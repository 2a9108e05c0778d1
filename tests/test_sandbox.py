"""Decoders that crash, hang or eat memory, planted behind real files: each costs its own image and nothing else."""

import gc
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import pyarrow as pa
import pytest
from conftest import IMG_SIZE, encode, red_or_blue, solid
from PIL import Image

from catsdogs.data import decode as decoding
from catsdogs.data import decode_budget, read_and_decode, sandbox, sandbox_child
from catsdogs.data.decode import DecodeForInference, view_images
from catsdogs.data.decode_messages import DecoderBugError, DecodeRequest
from catsdogs.data.sandbox import decode_in_subprocess
from catsdogs.errors import CatsdogsError
from catsdogs.images import Preprocessing, decode_image
from catsdogs.schema import FILES
from catsdogs.start import start_ray

STAGE = DecodeForInference(Preprocessing(img_size=IMG_SIZE), 10**8, batch_size=32)


@pytest.fixture(autouse=True)
def _no_child_is_left():
    """Fork after the test has planted its fault; leave no process behind."""
    sandbox.end_child()
    before = set(psutil.Process().children())  # the session's Ray and a proxy's, where other tests ran before
    yield
    sandbox.end_child()
    assert set(psutil.Process().children()) <= before


def child_pid():
    return sandbox._child.pid


def decode_alone(image_bytes, stage=STAGE):
    pixels = np.zeros((IMG_SIZE, IMG_SIZE, 3), np.uint8)
    return decode_in_subprocess(stage, [DecodeRequest(image_bytes, 0, pixels)])[0], pixels


def plant(monkeypatch, fault):
    """Make the decoder call `fault` on a file that contains b'poison'."""

    def planted(image_bytes, max_pixels):
        if b"poison" in image_bytes:
            fault()
        return decode_image(image_bytes, max_pixels)

    monkeypatch.setattr(decoding, "decode_image", planted)


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def eat():
    np.zeros(3 << 30, np.uint8)


def raise_name_error():
    raise NameError("name 'widht' is not defined")


def fail_to_allocate():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 432000000 bytes")


def test_pixels_come_back_as_they_are_in_this_process():
    for kind in ("JPEG", "PNG", "BMP"):
        image_bytes = encode(solid((200, 20, 30)), kind)
        decoded, pixels = decode_alone(image_bytes)
        assert (decoded.status, decoded.error, decoded.width, decoded.height) == ("ok", None, 40, 36)
        assert np.array_equal(pixels, STAGE.decode(image_bytes, 0).image)


def test_one_child_serves_until_its_decoder_changes():
    decode_alone(red_or_blue("red", 0))
    first = child_pid()
    for i in range(20):
        decode_alone(red_or_blue("red", i))
    assert child_pid() == first
    assert decode_alone(red_or_blue("red", 0), replace(STAGE, max_pixels=3))[0].status == "too_large"
    assert child_pid() != first
    assert not psutil.pid_exists(first)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (segfault, "the decoder died of SIGSEGV"),
        (os.abort, "the decoder died of SIGABRT"),
        (lambda: os._exit(3), "the decoder exited with code 3"),
        (eat, "decoding ran out of memory (limit 2 GiB)"),
        (fail_to_allocate, "decoding ran out of memory (limit 2 GiB)"),
    ],
)
def test_an_image_that_kills_a_decoder_costs_one_row(monkeypatch, tmp_path, fault, error):
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


@pytest.mark.parametrize("num_files", [1, 3])
def test_an_exception_of_the_decoder_is_raised_with_its_traceback(monkeypatch, num_files):
    plant(monkeypatch, raise_name_error)
    pixels = np.zeros((num_files, IMG_SIZE, IMG_SIZE, 3), np.uint8)
    contents = [red_or_blue("red", i) for i in range(num_files - 1)] + [red_or_blue("red", 9) + b"poison"]
    requests = [DecodeRequest(content, i, pixels[i]) for i, content in enumerate(contents)]
    with pytest.raises(DecoderBugError, match="NameError: name 'widht' is not defined") as raised:
        decode_in_subprocess(STAGE, requests)
    assert "in raise_name_error" in str(raised.value)
    assert not isinstance(raised.value, CatsdogsError)
    assert decode_alone(red_or_blue("red", 0))[0].status == "ok"


@pytest.mark.parametrize("part", ["configure_pillow", "restrict_process", "write_result"])
@pytest.mark.parametrize("error", [NameError("name 'widht' is not defined"), OSError("widht")])
def test_an_exception_anywhere_in_the_child_is_raised_with_its_traceback(monkeypatch, part, error):
    def fail(*_):
        raise error

    sandbox.end_child()
    monkeypatch.setattr(sandbox_child, part, fail)
    with pytest.raises(DecoderBugError, match="widht"):
        decode_alone(red_or_blue("red", 0))
    monkeypatch.undo()
    assert decode_alone(red_or_blue("red", 0))[0].status == "ok"


def test_a_child_applies_no_size_limit_of_pillow():
    before, _, after = encode(solid((200, 20, 30), (40, 36)), "GIF").rpartition(struct.pack("<HH", 40, 36))
    frame_size = struct.pack("<HH", 19_000, 19_000)  # more than twice Pillow's limit, where it raises an error
    result, _ = decode_alone(before + frame_size + after, replace(STAGE, max_pixels=5 * 10**8))
    assert (result.status, result.width, result.height) == ("decode_error", 19_000, 19_000)
    assert "limit" not in result.error


def test_a_decoder_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(decode_budget, "MAX_DECODE_S", 0.5)
    plant(monkeypatch, lambda: time.sleep(60))
    decoded, _ = decode_alone(red_or_blue("red", 0) + b"poison")
    assert (decoded.status, decoded.error) == ("decoder_crash", "decoding took more than 0.5 s")
    assert decode_alone(red_or_blue("red", 0))[0].status == "ok"


def test_a_killed_child_costs_no_image():
    decode_alone(red_or_blue("red", 0))
    for _ in range(3):
        os.kill(child_pid(), signal.SIGKILL)
        assert decode_alone(red_or_blue("red", 1))[0].status == "ok"


def test_an_interrupted_group_leaves_no_result_for_the_next(monkeypatch):
    """Ray cancels a task with an interrupt; its process runs the next one."""

    def raise_interrupt(_signal, _frame):
        raise KeyboardInterrupt

    plant(monkeypatch, lambda: time.sleep(60))
    before = signal.signal(signal.SIGUSR1, raise_interrupt)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            decode_alone(encode(solid((20, 30, 200), (50, 20))) + b"poison")
    finally:
        signal.signal(signal.SIGUSR1, before)
    image_bytes = red_or_blue("red", 1)
    for _ in range(2):
        result, pixels = decode_alone(image_bytes)
        assert (result.status, result.error, result.width, result.height) == ("ok", None, 40, 36)
        assert np.array_equal(pixels, STAGE.decode(image_bytes, 0).image)


def test_memory_of_an_image_is_free_for_the_next():
    large = encode(Image.new("RGB", (6000, 6000)), "PNG")
    for _ in range(6):
        assert decode_alone(large)[0].status == "ok"


def test_many_images_leave_no_descriptor_open():
    decode_alone(red_or_blue("red", 0))
    before = psutil.Process().num_fds()
    for i in range(5):
        os.kill(child_pid(), signal.SIGKILL)
        decode_alone(red_or_blue("red", i))
    assert psutil.Process().num_fds() == before


def test_the_child_keeps_no_descriptor_of_its_parent_and_ends_with_it(tmp_path):
    code = f"""
        import os, socket, time
        from catsdogs.data import sandbox
        from catsdogs.data.decode import DecodeForInference
        from catsdogs.data.decode_messages import DecodeRequest
        from catsdogs.images import Preprocessing
        import numpy as np
        listening = socket.create_server(("127.0.0.1", 0))
        stage = DecodeForInference(Preprocessing(img_size={IMG_SIZE}), 10**8, 32)
        sandbox.decode_in_subprocess(stage, [DecodeRequest(b"text", 0, np.zeros((1, 1, 3), np.uint8))])
        print(sandbox._child.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.num_fds() == 4  # the standard ones, and its end of the pipe
    parent.kill()
    parent.communicate()
    child.wait(timeout=60)


@dataclass(frozen=True)
class Stateless:
    """A decoder that reports the process that it runs in."""

    seen: tuple = field(default=())

    def decode(self, image_bytes, row):
        return replace(decode_image(b"x"), error=f"{os.getpid()} {row}")


def test_a_file_larger_than_the_limit_is_not_read(tmp_path):
    with (tmp_path / "vast.tif").open("wb") as file:
        file.truncate(5 << 30)
    (tmp_path / "x.jpg").write_bytes(red_or_blue("red", 1))
    paths = [f"{tmp_path}/vast.tif", f"{tmp_path}/x.jpg"] * 2
    sizes = [5 << 30, None, None, None]  # a manifest has no sizes
    (rows,) = STAGE(pa.table({"path": paths, "size_bytes": sizes, "version": [None] * 4}, schema=FILES))
    assert rows["status"].to_pylist() == ["too_large", "ok"] * 2
    assert rows["size_bytes"].to_pylist()[0] == 5 << 30
    assert "more than the 512 MiB" in rows["error"][0].as_py()


def test_files_that_do_not_fit_together_are_read_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "READ_BYTES", 1500)
    counts, original = [], decoding.decode_in_subprocess
    monkeypatch.setattr(decoding, "decode_in_subprocess", lambda *args: counts.append(len(args[1])) or original(*args))
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(red_or_blue("red", i))
    paths = [f"{tmp_path}/{i}.jpg" for i in range(6)]
    sizes = [(tmp_path / f"{i}.jpg").stat().st_size for i in range(6)]
    (rows,) = STAGE(pa.table({"path": paths, "size_bytes": sizes, "version": [None] * 6}, schema=FILES))
    assert rows["status"].to_pylist() == ["ok"] * 6
    assert sum(counts) == 6
    assert len(counts) > 2
    assert [view_images(rows, IMG_SIZE)[i].any() for i in range(6)] == [True] * 6


def test_the_decoder_gets_the_number_of_the_row():
    (decoded,) = decode_in_subprocess(Stateless(), [DecodeRequest(b"x", 41, np.zeros((1, 1, 3), np.uint8))])
    assert decoded.error == f"{child_pid()} 41"
    assert os.getpid() != child_pid()


def test_a_block_becomes_the_batches_of_the_model(ray_cluster, tmp_path):
    for i in range(21):
        (tmp_path / f"{i:02d}.jpg").write_bytes(red_or_blue("red", i))
    paths = [f"{tmp_path}/{i:02d}.jpg" for i in range(21)]
    files = pa.table({"path": paths, "size_bytes": [None] * 21, "version": [None] * 21}, schema=FILES)
    stage = replace(STAGE, batch_size=8)
    assert [block.num_rows for block in stage.split_into_blocks(files)] == [21]
    start_ray()
    decoded = read_and_decode(files, stage, num_cpus=1)
    batches = decoded.map_batches(lambda rows: {"paths": [",".join(rows["path"])]}, batch_size=None).take_all()
    assert [row["paths"].split(",") for row in batches] == [paths[:8], paths[8:16], paths[16:]]
    assert [
        block.num_rows for block in replace(STAGE, batch_size=100).split_into_blocks(pa.concat_tables([files] * 30))
    ] == [200, 200, 200, 30]


def test_a_failure_keeps_no_file_in_memory(monkeypatch):
    plant(monkeypatch, segfault)
    pixels = np.zeros((IMG_SIZE, IMG_SIZE, 3), np.uint8)
    reference = weakref.ref(pixels)
    gc.disable()
    try:
        decode_in_subprocess(STAGE, [DecodeRequest(red_or_blue("red", 0) + b"poison", 0, pixels)])
        del pixels
        assert reference() is None
    finally:
        gc.enable()
