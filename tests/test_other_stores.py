"""Reading by HTTP and through other file systems of fsspec, from servers and stores that fail."""

import asyncio
import email.utils
import ftplib
import socket
import threading
import time
from collections.abc import Iterator

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from web_server import Response, WebServer, serve

from benchmarks.faults.proxy import Fault, FaultProxy
from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.storage import Entry, Listing, other_stores

CONTENT = bytes(range(256)) * 8
GOOD = Response(body=CONTENT)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with serve() as started:
        yield started


@pytest.fixture
def delays(monkeypatch) -> list[float]:
    """Skip the delays between attempts, and collect them."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(other_stores.asyncio, "sleep", sleep)
    return slept


@pytest.fixture
def few_attempts(monkeypatch) -> None:
    monkeypatch.setattr(other_stores, "RETRY_S", 0.2)
    monkeypatch.setattr(other_stores, "MAX_DELAY_S", 0.05)


def read(*uris: str, limit_bytes: int = 1 << 30) -> list[storage.Fetched]:
    return storage.fetch([Entry(uri) for uri in uris], limit_bytes)


# HTTP


@pytest.mark.parametrize(
    "failure",
    [
        *(Response(status) for status in (408, 429, 500, 502, 503, 504, 520)),
        Response(body=CONTENT, num_sent=0),
        Response(body=CONTENT, num_sent=1000),
        Response(body=CONTENT, num_sent=1000, headers={"Content-Encoding": "gzip"}),
    ],
    ids=str,
)
def test_a_file_is_read_although_the_server_fails_twice(failure, server, delays):
    (row,) = read(server.add("a.jpg", failure, failure, GOOD))
    assert (row.status, row.content, row.retries) == ("ok", CONTENT, 2)
    assert server.requests["a.jpg"] == 3
    assert len(delays) == 2


def test_a_connection_that_closes_before_the_response_is_retried(server, delays):
    closes = Response(closes=True)  # aiohttp itself makes one more request
    (row,) = read(server.add("a.jpg", *[closes] * 4, GOOD))
    assert (row.status, row.content) == ("ok", CONTENT)
    assert server.requests["a.jpg"] == 5
    assert row.retries == len(delays) >= 2


def test_delays_grow_up_to_their_bound(server, delays):
    assert read(server.add("a.jpg", *[Response(503)] * 7, GOOD))[0].status == "ok"
    for delay, bound in zip(delays, [0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0], strict=True):
        assert bound / 2 <= delay <= bound


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when_to_try_again(status, server, delays):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    headers = [{"Retry-After": value} for value in ("7", date, "0", "soon", "-1")]
    assert read(server.add("a.jpg", *(Response(status, headers=each) for each in headers), GOOD))[0].status == "ok"
    assert delays[0] == 7
    assert 60 < delays[1] <= 100
    assert all(0 < delay <= 2 for delay in delays[2:])


def test_a_server_that_says_to_come_back_in_an_hour_is_not_asked_again(server, delays):
    (row,) = read(server.add("a.jpg", Response(429, headers={"Retry-After": "3600"}), GOOD))
    assert (row.status, row.error) == ("read_error", "HTTP 429 Too Many Requests")
    assert (server.requests["a.jpg"], delays) == (1, [])


@pytest.mark.parametrize(
    ("status", "row_status"),
    [
        *((status, "access_denied") for status in (401, 403)),
        *((status, "not_found") for status in (404, 410)),
        *((status, "read_error") for status in (304, 400, 402, 418, 451, 501)),
    ],
)
def test_a_definite_response_is_not_retried(status, row_status, server):
    (row,) = read(server.add("a.jpg", Response(status)))
    assert row.status == row_status
    assert row.error.startswith(f"HTTP {status}")
    assert server.requests["a.jpg"] == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Response(503), "HTTP 503 Service Unavailable"),
        (Response(body=CONTENT, num_sent=1000), "the body broke off after 1000 bytes"),
        (Response(closes=True), "Server disconnected"),
    ],
)
def test_a_file_that_keeps_failing_is_a_failed_row(failure, reason, server, few_attempts):
    rows = read(server.add("a.jpg", failure), server.add("b.jpg", GOOD))
    assert [row.status for row in rows] == ["read_error", "ok"]
    assert rows[0].error.startswith(reason)
    assert server.requests["a.jpg"] > 2


def test_a_server_that_is_down_is_a_failed_row(few_attempts):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (row,) = read(f"http://127.0.0.1:{unused.getsockname()[1]}/a.jpg?token=secret")
    assert row.status == "read_error"
    assert "Cannot connect" in row.error


def test_a_server_that_does_not_answer_is_a_failed_row_without_the_query(few_attempts, monkeypatch):
    monkeypatch.setattr(other_stores, "READ_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (row,) = read(f"http://127.0.0.1:{silent.getsockname()[1]}/a.jpg?token=secret")
    assert (row.status, row.error) == ("read_error", "no response in time")


def test_a_slow_body_is_abandoned(server, few_attempts, monkeypatch):
    monkeypatch.setattr(other_stores, "BODY_TIMEOUT_S", -1.0)
    (row,) = read(server.add("a.jpg", GOOD))
    assert (row.status, row.error) == ("read_error", "the body broke off after 2048 bytes: it took too long")


@pytest.mark.parametrize("location", ["/a.jpg", "ftp://127.0.0.1/a.jpg", "http://["])
def test_a_redirect_that_leads_nowhere_is_not_retried(location, server):
    (row,) = read(server.add("a.jpg", Response(302, headers={"Location": location})))
    assert row.status == "read_error"
    assert server.requests["a.jpg"] <= 11


def test_a_redirect_is_followed(server):
    target = server.add("b.jpg", GOOD)
    (row,) = read(server.add("a.jpg", Response(302, headers={"Location": target})))
    assert (row.status, row.content) == ("ok", CONTENT)


def test_a_url_that_is_none_is_not_retried():
    assert [row.status for row in read("http://", "http://[/a.jpg", "https://:x/a.jpg")] == ["read_error"] * 3


@pytest.mark.parametrize("headers", [{}, {"Content-Length": ""}], ids=["known length", "unknown length"])
def test_a_file_over_the_limit_is_not_read_to_its_end(headers, server):
    (row,) = read(server.add("a.jpg", Response(body=CONTENT, headers=headers)), limit_bytes=1000)
    assert row.status == "decoder_crash"
    assert "2048 bytes, more than" in row.error
    assert server.requests["a.jpg"] == 1


def test_files_are_read_concurrently(server, monkeypatch):
    all_requested, respond = threading.Barrier(16, timeout=20), server.respond
    monkeypatch.setattr(server, "respond", lambda path: (all_requested.wait(), respond(path))[1])
    rows = read(*(server.add(f"{i}.jpg", GOOD) for i in range(16)))
    assert [row.content for row in rows] == [CONTENT] * 16


def test_503_on_half_of_all_requests_loses_nothing(server, delays):
    with FaultProxy(server.url, seed=3) as proxy:
        uris = [server.add(f"in/{i}.jpg", Response(body=CONTENT + bytes([i]))) for i in range(30)]
        proxy.reset(Fault("slow_down", probability=0.5))
        rows = read(*(uri.replace(server.url, proxy.endpoint) for uri in uris))
        assert [row.content for row in rows] == [CONTENT + bytes([i]) for i in range(30)]
        assert sum(row.retries for row in rows) == proxy.counts.injected["slow_down"] > 0


@pytest.mark.parametrize("what", ["cut", "reset"])
def test_a_connection_that_breaks_within_the_body_is_retried(what, server, delays):
    with FaultProxy(server.url) as proxy:
        proxy.reset(Fault(what, first=2, at_byte=1000))
        (row,) = read(server.add("in/a.jpg", GOOD).replace(server.url, proxy.endpoint))
        assert (row.status, row.content, row.retries) == ("ok", CONTENT, 2)


def test_each_retry_is_logged_with_its_traceback(server, delays, caplog):
    caplog.set_level("DEBUG", logger="catsdogs")
    uri = server.add("a.jpg", Response(503), GOOD)
    read(uri)
    (record,) = [record for record in caplog.records if record.name == "catsdogs.storage.other_stores"]
    assert record.getMessage() == f"GET {uri}: attempt 1 failed"
    assert "HTTP 503" in record.exc_text


def test_a_small_file_is_read_with_retries(server, delays, few_attempts):
    assert storage.read_bytes(server.add("config.json", Response(503), GOOD)) == CONTENT
    with pytest.raises(RunError, match=r"cannot read http://.*/busy: HTTP 503 Service Unavailable"):
        storage.read_bytes(server.add("busy", Response(503)))
    for status in (401, 404):
        with pytest.raises(InputError, match=f"HTTP {status}"):
            storage.read_bytes(server.add(str(status), Response(status)))
    assert storage.read_versioned(f"{server.url}/gone") is None


def test_a_file_of_a_busy_server_is_not_taken_for_missing(server, delays, few_attempts):
    assert storage.exists(server.add("config.json", Response(503), GOOD))
    assert not storage.exists(f"{server.url}/gone")
    with pytest.raises(RunError, match="503"):
        storage.exists(server.add("busy", Response(503)))
    with pytest.raises(InputError, match="403"):
        storage.exists(server.add("secret", Response(403)))


# Other file systems of fsspec


class ServiceError(Exception):
    """An error as those of cloud packages: with the HTTP status, or with the response."""

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(message)
        self.__dict__ |= attributes


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe_file("memory://root/a.jpg", CONTENT)
    yield "memory://root"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def fail(monkeypatch, method: str, *errors: Exception) -> list[Exception]:
    """Make a method of the file system raise errors in turn, then work; return those that were not raised yet."""
    real, remaining = getattr(MemoryFileSystem, method), list(errors)

    def failing(self, *arguments, **options):
        if remaining:
            raise remaining.pop(0)
        return real(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, method, failing)
    return remaining


TRANSIENT = [
    ConnectionResetError(104, "Connection reset by peer"),
    TimeoutError(),
    OSError(113, "No route to host"),
    EOFError(),
    ftplib.error_temp("421 Too many connections"),
    ServiceError("busy", code=503),
    ServiceError("busy", status_code=429),
    ServiceError("busy", response=Response(500)),
]
PERMANENT = {
    "not_found": [FileNotFoundError("gone"), ServiceError("gone", code=410), ServiceError("", response=Response(404))],
    "access_denied": [PermissionError("no"), ServiceError("no", status=401), ServiceError("no", status_code=403)],
    "read_error": [
        ValueError("no"),
        IsADirectoryError("a folder"),
        ServiceError("no", code=400),
        ZeroDivisionError("x"),
    ],
}


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_a_transient_error_of_a_file_system_is_retried(error, memory, monkeypatch, delays):
    fail(monkeypatch, "cat_file", error, error)
    (row,) = read(f"{memory}/a.jpg")
    assert (row.status, row.content, row.retries) == ("ok", CONTENT, 2)


@pytest.mark.parametrize(
    ("status", "error"), [(name, error) for name in PERMANENT for error in PERMANENT[name]], ids=repr
)
def test_a_permanent_error_of_a_file_system_is_not_retried(status, error, memory, monkeypatch):
    remaining = fail(monkeypatch, "cat_file", error, error)
    (row,) = read(f"{memory}/a.jpg")
    assert row.status == status
    assert row.error
    assert len(remaining) == 1


def test_a_store_says_when_to_try_again(memory, monkeypatch, delays):
    response = Response(429, headers={"Retry-After": "9"})
    fail(monkeypatch, "cat_file", ServiceError("busy", response=response))
    assert read(f"{memory}/a.jpg")[0].status == "ok"
    assert delays == [9]


def test_a_store_that_keeps_failing_is_a_failed_row(memory, monkeypatch, few_attempts):
    remaining = fail(monkeypatch, "cat_file", *[ConnectionResetError("reset")] * 1000)
    (row,) = read(f"{memory}/a.jpg")
    assert (row.status, row.error) == ("read_error", "reset")
    assert len(remaining) < 998


def test_a_file_over_the_limit_is_refused(memory):
    assert read(f"{memory}/a.jpg", limit_bytes=1000)[0].status == "decoder_crash"


CALLS = {
    "pipe_file": lambda root: storage.write_bytes(f"{root}/b", b"x"),
    "rm_file": lambda root: storage.remove(f"{root}/a.jpg"),
    "exists": lambda root: storage.create_bytes(f"{root}/b", b"x"),
    "ls": storage.list_names,
    "find": lambda root: len(list(Listing(root))),
}


@pytest.mark.parametrize("method", CALLS)
def test_listings_and_writes_are_retried_too(method, memory, monkeypatch, delays, few_attempts):
    fail(monkeypatch, method, ConnectionResetError("reset"))
    assert CALLS[method](memory) in (None, True, ["a.jpg"], 1)
    assert len(delays) == 1
    fail(monkeypatch, method, *[ServiceError("busy", code=503)] * 100_000)
    with pytest.raises(RunError, match="busy"):
        CALLS[method](memory)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of FTPFileSystem.__del__
@pytest.mark.parametrize("scheme", ["ftp", "sftp", "github", "zip", "tar", "reference", "webhdfs", "jupyter", "dir"])
def test_a_scheme_that_needs_settings_is_refused_in_one_line(scheme):
    with pytest.raises(InputError, match=f"cannot open {scheme}://host/path"):
        storage.absolute(f"{scheme}://host/path")


def test_reads_of_other_stores_can_be_cancelled(memory, monkeypatch):
    started = threading.Event()

    async def sleep(_: float) -> None:
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(other_stores.asyncio, "sleep", sleep)
    fail(monkeypatch, "cat_file", *[ConnectionResetError()] * 2)
    groups = storage.fetch_ahead([[Entry("/absent")], [Entry(f"{memory}/a.jpg")]])
    assert next(groups)[0].status == "not_found"
    assert started.wait(20)
    groups.close()
