"""Shards are scored while a long listing continues. The server of most tests holds back a page until it is released."""

import contextlib
import http.server
import signal
import threading
import time
import urllib.parse

import pytest
from forked import Forked
from scoring import ByteClassifier, check_output, read_rows, run_scoring, write_images

from catsdogs import storage
from catsdogs.progress import Message
from catsdogs.score import background
from catsdogs.score.plan import Plan

TIMEOUT_S = 60.0
KEYS = [f"in/{name}.jpg" for name in "abcdefghijkl"]
PAGE_KEYS, HELD_PAGE = 3, 2  # two shards are listed before the page that is held back
DRIVER = """
import sys
from scoring import run_scoring
from catsdogs.errors import CatsdogsError
from catsdogs.score import background

background.FIRST_WAVE_S = background.WAVE_S = 0.01
try:
    run_scoring("s3://slow/in", sys.argv[1], progress=lambda event: print(event, flush=True))
except CatsdogsError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class SlowStore(http.server.ThreadingHTTPServer):
    """Lists KEYS in pages and answers one of them, with `held_status`, once `release` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keys, self.held_status = list(KEYS), 200
        self.requested, self.release = threading.Event(), threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlowStore

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        _, _, key = url.path.strip("/").partition("/")
        if key:
            self._send(200, key.encode()[-5:])
            return
        query = dict(urllib.parse.parse_qsl(url.query))
        after = query.get("continuation-token", query.get("start-after", ""))
        found = [key for key in self.server.keys if key > after]
        is_held = len(self.server.keys) - len(found) == HELD_PAGE * PAGE_KEYS
        if is_held:
            self.server.requested.set()
            self.server.release.wait(TIMEOUT_S)
        self._send(self.server.held_status if is_held else 200, _format_page(found))

    def _send(self, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the driver is killed
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"e"')
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _format_page(keys: list[str]) -> bytes:
    page, rest = keys[:PAGE_KEYS], keys[PAGE_KEYS:]
    items = "".join(f'<Contents><Key>{key}</Key><Size>5</Size><ETag>"e"</ETag></Contents>' for key in page)
    token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if rest else ""
    truncated = f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
    return f"<ListBucketResult>{truncated}{token}{items}</ListBucketResult>".encode()


@pytest.fixture
def store():
    with SlowStore() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def driver(store, output):
    """Run a driver in a separate process."""
    return Forked(DRIVER, str(output), AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{store.server_port}")


def wait_for_parts(output):
    """Wait until the shards before the page that is held back are scored."""
    deadline = time.monotonic() + TIMEOUT_S
    while not all((output / "_stats" / f"part-{shard:05}.json").exists() for shard in range(HELD_PAGE)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def score_without_pause(store, output):
    """Score what the store lists, and return the rows."""
    store.release.set()
    with driver(store, output) as process:
        done = process.wait(TIMEOUT_S)
        assert done.returncode == 0, done.stderr
    check_output(str(output), len(store.keys))
    return read_rows(str(output))


def test_parts_are_written_before_the_listing_ends(store, tmp_path):
    with driver(store, tmp_path / "out") as process:
        wait_for_parts(tmp_path / "out")
        assert store.requested.wait(TIMEOUT_S)
        assert Plan.load(str(tmp_path / "out")).listing_cursor == "s3://slow/in/f.jpg"
        store.release.set()
        done = process.wait(TIMEOUT_S)
        assert done.returncode == 0, done.stderr
    assert "files to score so far; the listing continues" in done.stdout
    assert "listed so far" in done.stdout
    check_output(str(tmp_path / "out"), len(KEYS))
    assert read_rows(str(tmp_path / "out")) == score_without_pause(store, tmp_path / "fresh")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_while_it_lists_and_scores_loses_and_doubles_nothing(kind, store, tmp_path):
    with driver(store, tmp_path / "out") as process:
        wait_for_parts(tmp_path / "out")
        assert store.requested.wait(TIMEOUT_S)
        process.send_signal(kind)
        process.wait(TIMEOUT_S)  # the page is still held back
    store.keys.remove("in/h.jpg")
    assert score_without_pause(store, tmp_path / "out") == score_without_pause(store, tmp_path / "fresh")


def test_an_error_of_the_listing_ends_the_run_and_finished_parts_are_kept(store, tmp_path):
    store.held_status = 403
    with driver(store, tmp_path / "out") as process:
        wait_for_parts(tmp_path / "out")
        store.release.set()
        done = process.wait(TIMEOUT_S)
    assert done.returncode == 1
    assert "InputError: cannot list s3://slow/in: " in done.stderr
    assert "Traceback" not in done.stderr
    store.held_status = 200
    assert len(score_without_pause(store, tmp_path / "out")) == len(KEYS)


# A local folder, whose listing waits


class HeldListing(storage.Listing):
    """Waits before the last file."""

    release = threading.Event()
    max_wait_s = TIMEOUT_S

    def __iter__(self):
        entries = list(super().__iter__())
        for entry in entries:
            if entry == entries[-1]:
                self.release.wait(self.max_wait_s)
            yield entry


@pytest.fixture
def held(monkeypatch):
    monkeypatch.setattr(storage, "Listing", HeldListing)
    monkeypatch.setattr(background, "FIRST_WAVE_S", 0.01)
    HeldListing.release.clear()
    return HeldListing.release


def test_with_a_limit_nothing_is_scored_before_the_listing_ends(held, tmp_path, monkeypatch):
    monkeypatch.setattr(HeldListing, "max_wait_s", 0.3)  # long enough for a wave
    write_images(tmp_path / "in", **{name: name for name in "abcdefg"})
    lines = []
    run_scoring(tmp_path / "in", tmp_path / "out", progress=lines.append, limit=7)
    assert [line.text for line in lines if isinstance(line, Message)] == [
        "7 of 7 files to score",
        "classifying on by hand",
    ]
    check_output(str(tmp_path / "out"), 7)


def test_a_later_listing_scores_new_files_at_once_and_changed_ones_at_its_end(held, tmp_path):
    waves = []

    class Releasing(ByteClassifier):
        def __call__(self, shards):
            waves.append([shard.uri.removeprefix(f"{tmp_path}/out/") for shard in shards])
            held.set()
            return super().__call__(shards)

    held.set()
    write_images(tmp_path / "in", **{name: name for name in "adez"})
    run_scoring(tmp_path / "in", tmp_path / "out")
    held.clear()
    write_images(tmp_path / "in", a="changed", b="b", c="c", d="changed", f="f", g="g")
    run_scoring(tmp_path / "in", tmp_path / "out", classifier=Releasing())
    assert waves[0] == ["_manifest/part-00002.parquet"]
    assert "_manifest/_redo/part-00000.parquet" in waves[-1]
    check_output(str(tmp_path / "out"), 8)
