"""Decoders under the control of a malicious image: what they try fails, and what they send is checked."""

import ctypes
import gc
import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import IMG_SIZE, encode, solid
from test_heif import HEIC, has_libheif

from catsdogs.data import child_process, decode_budget, sandbox, sandbox_child
from catsdogs.data.decode import DecodeForTraining
from catsdogs.data.decode_messages import DONE, RESULT, DecoderBugError, DecodeRequest
from catsdogs.data.sandbox import decode_in_subprocess
from catsdogs.images import Decoded, Preprocessing

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is part of Linux")
PTRACE_ATTACH = 16
REFUSED = {"Operation not permitted", "Too many open files"}


@pytest.fixture(autouse=True)
def _no_child_is_left():
    sandbox.end_child()
    yield
    sandbox.end_child()


@dataclass(frozen=True)
class Hostile:
    """A decoder that does something else with the first file, and reports the outcome."""

    act: Callable[[], object]

    def decode(self, image_bytes, row):
        try:
            outcome = self.act() if row == 0 else "decoded"
        except OSError as error:
            outcome = error.strerror
        return Decoded("unsupported", None, f"{outcome}", None, None)


def run_hostile(act, num_files=1):
    pixels = np.zeros((num_files, 1, 1, 3), np.uint8)
    return decode_in_subprocess(Hostile(act), [DecodeRequest(b"x", i, image) for i, image in enumerate(pixels)])


def outcome_of(act):
    (result,) = run_hostile(act)
    assert result.status == "unsupported"
    return result.error


def call_ptrace(pid):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "attached"


@linux_only
def test_a_decoder_cannot_read_or_write_a_file(tmp_path):
    assert outcome_of(lambda: Path("/etc/passwd").read_text()) in REFUSED
    assert outcome_of(lambda: (tmp_path / "written").write_text("text")) in REFUSED
    assert outcome_of(lambda: os.mkdir(tmp_path / "made")) in REFUSED
    assert list(tmp_path.iterdir()) == []


class Finalized:
    """Counts the processes that finalize it; only the garbage collector can, because it refers to itself."""

    def __init__(self, count):
        self.count, self.itself = count, self

    def __del__(self):
        self.count[0] += 1


def test_the_child_runs_no_finalizer_of_the_parent():
    """That of a Ray object reference sends a message on the parent's connection, whose next request is then lost."""
    count = np.frombuffer(mmap.mmap(-1, 8), np.uint8)  # shared with the child
    gc.disable()
    try:
        Finalized(count)
        outcome_of(gc.collect)
        assert count[0] == 0
    finally:
        gc.enable()
    gc.collect()
    assert count[0] == 1


@linux_only
def test_a_decoder_cannot_change_a_file_that_the_parent_has_mapped(tmp_path):
    """Ray's object store is such a file: code in a changed pickle of an object runs where it is read."""
    path = tmp_path / "objects"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as objects:
        address = np.frombuffer(objects, np.uint8).ctypes.data
        (result,) = run_hostile(lambda: ctypes.memset(address, 65, 8))
        assert objects[:8] == bytes(8)
    assert (result.status, result.error) == ("decoder_crash", "the decoder died of SIGSEGV")


@linux_only
def test_a_decoder_cannot_connect():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert outcome_of(lambda: socket.create_connection(server.getsockname(), timeout=5)) in REFUSED
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@linux_only
def test_a_decoder_cannot_run_a_program_or_fork(tmp_path):
    made = str(tmp_path / "made")
    assert outcome_of(lambda: os.execv("/bin/touch", ["touch", made])) in REFUSED
    assert outcome_of(lambda: os.posix_spawn("/bin/touch", ["touch", made], {})) in REFUSED
    assert outcome_of(os.fork) in REFUSED
    assert not os.path.exists(made)


@linux_only
def test_a_decoder_cannot_signal_or_trace_another_process():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        assert outcome_of(lambda: os.kill(victim.pid, signal.SIGKILL)) in REFUSED
        assert outcome_of(lambda: os.kill(0, signal.SIGURG)) in REFUSED
        assert outcome_of(lambda: call_ptrace(victim.pid)) in REFUSED
        assert victim.poll() is None
        victim.kill()


@linux_only
def test_without_seccomp_a_decoder_opens_nothing_and_says_so(monkeypatch, capfd, caplog):
    def refuse():
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(sandbox_child, "restrict_system_calls", refuse)
    assert outcome_of(lambda: open("/etc/passwd").read()) == "Too many open files"  # noqa: SIM115
    assert outcome_of(lambda: socket.socket().fileno()) == "Too many open files"
    caplog.set_level(logging.DEBUG, logger=sandbox_child.__name__)
    handler = logging.StreamHandler(open(2, "w", closefd=False))  # noqa: SIM115
    sandbox_child.logger.addHandler(handler)
    sandbox.end_child()
    outcome_of(lambda: None)
    sandbox_child.logger.removeHandler(handler)
    assert "decoders can open files and sockets: [Errno 38]" in capfd.readouterr().err


def test_a_decoder_has_no_environment_and_no_stdin(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    assert outcome_of(lambda: dict(os.environ)) == "{}"
    assert outcome_of(lambda: ctypes.CDLL(None).getenv(b"AWS_SECRET_ACCESS_KEY")) == "0"
    assert outcome_of(lambda: [os.ttyname(fd) for fd in (0, 1) if os.isatty(fd)]) == "[]"
    assert outcome_of(lambda: os.read(0, 10)) == "b''"


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


BAD_RESULTS = {
    "noise": bytes(range(200, 200 + RESULT.size)),
    "ok without a size": RESULT.pack(1, -1, -1, 0.0, 0),
    "ok with an error": RESULT.pack(1, 1, 1, 0.0, 1),
    "no status": RESULT.pack(8, -1, -1, 0.0, 0),
    "one side": RESULT.pack(2, 5, -1, 0.0, 0),
    "not a time": RESULT.pack(2, -1, -1, float("nan"), 0),
    "a time before": RESULT.pack(2, -1, -1, -1.0, 0),
    "a vast text": RESULT.pack(2, -1, -1, 0.0, 2**32 - 1),
    "not UTF-8": RESULT.pack(2, -1, -1, 0.0, 2) + b"\xff\xff",
}


@pytest.mark.parametrize("content", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_bytes_that_are_no_result_cost_one_row(monkeypatch, content):
    original = sandbox_child.write_result

    def write(slot, result):
        original(slot, result)
        if result.error != "decoded":
            slot[: len(content)] = np.frombuffer(content, np.uint8)

    monkeypatch.setattr(sandbox_child, "write_result", write)
    results = run_hostile(lambda: None, num_files=3)
    assert [result.status for result in results] == ["decoder_crash", "unsupported", "unsupported"]
    assert results[0].error == "the decoder sent an invalid result"


@pytest.mark.parametrize("content", [b"\0", b"noise", DONE, DONE * 1000, b"x" * 10_000])
def test_bytes_that_are_no_reply_cost_one_row(content):
    def send():
        os.write(sandbox_child.SOCKET, content)
        time.sleep(0.1)

    results = run_hostile(send, num_files=3)
    assert [result.status for result in results] == ["decoder_crash", "unsupported", "unsupported"]
    assert results[0].error == "the decoder sent an invalid result"


def test_a_pickle_in_place_of_a_result_is_not_loaded(tmp_path):
    path = str(tmp_path / "made")
    content = pickle.dumps(Payload(path))
    results = run_hostile(lambda: os.write(sandbox_child.SOCKET, len(content).to_bytes(4) + content), num_files=2)
    assert [result.status for result in results] == ["decoder_crash", "unsupported"]
    assert not os.path.exists(path)


def sleep_without_timer():
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(600)


def close_and_sleep():
    os.close(sandbox_child.SOCKET)
    sleep_without_timer()


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (sleep_without_timer, "decoding took more than 0.5 s"),
        (close_and_sleep, "the decoder died of SIGKILL"),
    ],
)
def test_a_decoder_that_switches_its_timer_off_is_ended(monkeypatch, act, error):
    monkeypatch.setattr(decode_budget, "MAX_DECODE_S", 0.5)
    monkeypatch.setattr(child_process, "MAX_DECODE_S", 5)
    results = run_hostile(act, num_files=2)
    assert [(result.status, result.error) for result in results] == [
        ("decoder_crash", error),
        ("unsupported", "decoded"),
    ]


def test_a_traceback_has_no_control_characters_and_a_limited_length():
    def fail():
        raise NameError("\x1b[2J" + "x" * 10**6)

    with pytest.raises(DecoderBugError) as raised:
        run_hostile(fail)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 10**5


def list_formats():
    """One file of each format; large ones, because libraries start threads for these."""
    files = {kind: encode(solid((200, 20, 60), (800, 700)), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")}
    files |= {kind: encode(solid((200, 20, 60), (800, 700)), kind) for kind in ("TIFF", "AVIF")}
    return files | ({"HEIC": HEIC} if has_libheif() else {})


@pytest.mark.parametrize("augmentation", ["none", "light", "affine"])
def test_every_format_and_augmentation_needs_no_further_rights(augmentation):
    preprocessing = Preprocessing(img_size=IMG_SIZE)
    stage = DecodeForTraining(preprocessing, 10**8, 32, augmentation, 0, (0, 1))
    files = list_formats()
    pixels = np.zeros((len(files), *stage.shape), np.uint8)
    requests = [DecodeRequest(content, i, pixels[i]) for i, content in enumerate(files.values())]
    results = decode_in_subprocess(stage, requests)
    assert {name: result.error for name, result in zip(files, results, strict=True)} == dict.fromkeys(files)
    for request in requests:
        assert np.array_equal(request.pixels, stage.decode(request.image_bytes, request.row).image)
