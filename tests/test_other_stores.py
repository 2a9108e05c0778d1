"""Reading by HTTP and through other file systems of fsspec, from servers and stores that fail."""

import asyncio
import email.utils
import ftplib
import gzip
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from web_server import Response, WebServer, serve

from benchmarks.faults.proxy import Fault, FaultProxy
from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.storage import Entry, Listing, fetching, http_listing, http_store, limits, other_stores, reading
from catsdogs.storage.event_loop import run_sync

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


@pytest.mark.parametrize(
    "date",
    [
        "Mon, 01 Jan 2024 00:00:00 +99999999999999",
        "Mon, 99999999999999999999 Jan 2024 00:00:00 GMT",
        "Mon, 01 Jan 99999999999 00:00:00 GMT",
    ],
)
def test_a_date_that_does_not_exist_is_ignored(date, server, delays):
    assert read(server.add("a.jpg", Response(503, headers={"Retry-After": date}), GOOD))[0].status == "ok"
    assert 0 < delays[0] <= 2


def test_a_server_that_says_to_come_back_in_an_hour_is_not_asked_again(server, delays):
    (row,) = read(server.add("a.jpg", Response(429, headers={"Retry-After": "3600"}), GOOD))
    assert (row.status, row.error) == ("read_error", "HTTP 429 Too Many Requests")
    assert (server.requests["a.jpg"], delays) == (1, [])


@pytest.mark.parametrize(
    ("status", "row_status"),
    [
        *((status, "access_denied") for status in (401, 403)),
        *((status, "not_found") for status in (404, 410)),
        *((status, "read_error") for status in (201, 204, 206, 304, 400, 402, 418, 451, 501)),
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
    monkeypatch.setattr(http_store, "READ_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (row,) = read(f"http://127.0.0.1:{silent.getsockname()[1]}/a.jpg?token=secret")
    assert (row.status, row.error) == ("read_error", "no response in time")


def test_a_slow_body_is_abandoned(server, few_attempts, monkeypatch):
    monkeypatch.setattr(http_store, "BODY_TIMEOUT_S", -1.0)
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
    assert row.status == "too_large"
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


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate"])
def test_a_compressed_body_is_unpacked(encoding, server, few_attempts):
    body = zlib.compress(CONTENT) if encoding == "deflate" else gzip.compress(CONTENT)
    headers = {"Content-Encoding": encoding}
    rows = read(
        server.add("a.jpg", Response(body=body, headers=headers)),
        server.add("b.jpg", Response(body=body[:-9], headers=headers)),
        server.add("c.jpg", Response(body=body, headers={"Content-Encoding": "br"})),
    )
    assert [row.content for row in rows] == [CONTENT, None, None]
    assert "the compressed data are incomplete" in rows[1].error
    assert rows[2].error == "the body has the encoding 'br', expected none or gzip"


def test_every_member_of_a_compressed_body_is_unpacked(server, few_attempts):
    first, second = gzip.compress(CONTENT[:1000]), gzip.compress(CONTENT[1000:])
    bodies = (first + second, first + bytes(100_000) + second + bytes(9), first + second[:-9], first + b"\x1fother")
    headers = {"Content-Encoding": "gzip"}
    rows = read(*(server.add(f"{i}.jpg", Response(body=body, headers=headers)) for i, body in enumerate(bodies)))
    assert [row.content for row in rows] == [CONTENT, CONTENT, None, None]
    assert rows[2].error.endswith("the compressed data are incomplete")
    assert (rows[3].error, server.requests["3.jpg"]) == ("other data follow the compressed data", 1)


@pytest.mark.parametrize("endless", [gzip.compress(b""), b"\0", b"\1"], ids=["members", "padding", "other data"])
def test_a_compressed_body_that_does_not_end_is_not_read_to_its_end(endless, server):
    body = gzip.compress(CONTENT) + endless * ((8 << 20) // len(endless))
    for length in ("", str(len(body))):
        headers = {"Content-Encoding": "gzip", "Content-Length": length}
        (row,) = read(server.add("a.jpg", Response(body=body, headers=headers)), limit_bytes=1 << 20)
        assert row.status == ("read_error" if endless == b"\1" and not length else "too_large")


def test_a_bomb_is_not_unpacked(server, monkeypatch):
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1 << 20)
    sizes = []
    check_length = http_store.check_length
    monkeypatch.setattr(http_store, "check_length", lambda size, limit: (sizes.append(size), check_length(size, limit)))
    bomb = Response(body=gzip.compress(bytes(100 << 20)), headers={"Content-Encoding": "gzip"})
    with pytest.raises(InputError, match="more than the 1 MiB that are read"):
        storage.read_bytes(server.add("config.json", bomb))
    assert max(sizes) == (1 << 20) + 1


@pytest.mark.parametrize("headers", [{}, {"Content-Length": ""}], ids=["known length", "unknown length"])
def test_a_small_file_has_a_limit_too(headers, server, memory, monkeypatch):
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    for uri in (server.add("config.json", Response(body=CONTENT, headers=headers)), f"{memory}/a.jpg"):
        with pytest.raises(InputError, match="bytes, more than the 1000 bytes that are read of such a file"):
            storage.read_bytes(uri)


def test_an_image_over_the_limit_in_the_listing_is_not_requested(server):
    (row,) = storage.fetch([Entry(server.add("a.jpg", GOOD), 2048)], 1000)
    assert (row.status, row.error) == ("too_large", "2048 bytes, more than the 1000 bytes that are read of such a file")
    assert not server.requests


def test_a_file_that_became_larger_than_listed_is_not_read_to_its_end(server, memory):
    rows = storage.fetch([Entry(uri, 1000) for uri in (server.add("a.jpg", GOOD), f"{memory}/a.jpg")])
    assert [row.status for row in rows] == ["changed"] * 2
    assert rows[0].error == "has at least 2048 bytes, was listed with 1000"
    assert rows[1].error == "has at least 1001 bytes, was listed with 1000"


def test_a_large_file_that_was_not_listed_is_read_alone_in_its_turn(server, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_UNLISTED_BYTES", 1000)
    small = Response(body=b"small")
    entries = [Entry(server.add(f"{i}.jpg", GOOD if i == 1 else small)) for i in range(4)]
    lists = list(storage.fetch_ahead([entries[:3], entries[3:]]))
    assert [[file.content for file in files] for files in lists] == [[b"small"], [CONTENT], [b"small"], [b"small"]]
    assert server.requests["1.jpg"] == 2
    assert storage.fetch(entries[1:2])[0].content == CONTENT
    assert [file.status for files in storage.fetch_ahead([entries[:2]], 1500) for file in files] == ["ok", "too_large"]


def test_the_files_of_a_task_have_a_common_deadline(server, monkeypatch):
    monkeypatch.setattr(limits, "DEADLINE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        slow = [Entry(f"http://127.0.0.1:{silent.getsockname()[1]}/{i}.jpg") for i in range(80)]
        good = Entry(server.add("a.jpg", GOOD))
        lists = list(storage.fetch_ahead([[good, *slow[:8]], *([entry] for entry in slow[8:])]))
    statuses = [file.status for files in lists for file in files]
    assert statuses == ["ok"] + ["read_error"] * 80
    assert lists[0][1].error == "not read in time: the files of a task took more than 2 s"


def test_time_in_which_a_task_decodes_does_not_count(server, monkeypatch):
    monkeypatch.setattr(limits, "DEADLINE_S", 3.0)
    groups = storage.fetch_ahead([[Entry(server.add(f"{i}.jpg", GOOD))] for i in range(3)])
    monkeypatch.setattr(fetching, "MAX_AHEAD_BYTES", 1)
    for files in groups:
        assert [file.status for file in files] == ["ok"]
        time.sleep(1.6)


def test_a_small_file_and_a_listing_have_a_deadline(monkeypatch):
    monkeypatch.setattr(limits, "DEADLINE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(RunError, match=r"cannot read http.*/x: it took more than 0\.5 s"):
            storage.read_bytes(url)
        with pytest.raises(RunError, match=r"cannot list http.*/x: it took more than 0\.5 s"):
            list(Listing(url))
        with pytest.raises(RunError, match=r"it took more than 0\.5 s"):
            storage.exists(url)


def test_the_query_of_a_url_is_in_no_error(server, few_attempts):
    for uri in (f"{server.url}/absent?w=secret", "http://127.0.0.1:1/a?w=secret", "http://[/a.jpg?w=secret"):
        with pytest.raises((InputError, RunError)) as caught:
            storage.read_bytes(uri)
        assert "secret" not in str(caught.value)
        assert "secret" not in read(uri)[0].error


# Redirects


def test_a_redirect_from_https_to_http_is_not_followed(server):
    target = server.add("b.jpg", GOOD)
    with serve(tls=True) as secure:
        url = secure.add("a.jpg", Response(302, headers={"Location": target}))
        fs = fsspec.filesystem("https", ssl=False)  # no check of the certificate
        with pytest.raises(http_store.StoreError, match="redirected from https to http, which is not followed"):
            run_sync(http_store.read_url, fs, url, 10_000)
        same = secure.add("c.jpg", Response(302, headers={"Location": "/d.jpg"}))
        secure.add("d.jpg", GOOD)
        assert run_sync(http_store.read_url, fs, same, 10_000) == CONTENT
    assert not server.requests


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "169.254.169.254",
    "::1",
    "fe80::1%eth0",
    "fd00::1",
    "::ffff:10.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::192.0.0.9",
    "64:ff9b:1::8.8.8.8",
    "2002:a9fe:a9fe::1",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
    "192.0.0.9",
]
PUBLIC = ["93.184.216.35", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("address", [*PRIVATE, "0.0.0.0"])
def test_a_redirect_from_a_public_host_to_a_private_address_is_not_followed(address, server, monkeypatch):
    addresses = {"localhost": ["93.184.216.34"], "127.0.0.1": ["93.184.216.34", address]}
    monkeypatch.setattr(http_store, "list_addresses", addresses.__getitem__)
    target = server.add("secret", GOOD)
    url = server.add("a.jpg", Response(302, headers={"Location": target})).replace("127.0.0.1", "localhost")
    (row,) = read(url)
    reason = "redirected from a public host to the private address 127.0.0.1, which is not followed"
    assert (row.status, row.error) == ("read_error", reason)
    assert not storage.exists(server.add("gone", Response(404)))
    with pytest.raises(InputError, match="redirected from a public host"):
        storage.exists(url)
    assert server.requests["secret"] == 0
    addresses["127.0.0.1"] = PUBLIC
    assert read(url)[0].content == CONTENT


# Listings of web servers


def html(*links: str) -> Response:
    text = "<html><body>" + "".join(f'<a class="x" href="{link}">{link}</a>' for link in links) + "</body></html>"
    return Response(body=text.encode(), headers={"Content-Type": "text/html; charset=utf-8"})


def test_only_links_below_the_folder_are_listed(server):
    links = ["../secret.jpg", "/secret.jpg", "http://other.example/c.jpg", "//other.example/in/d.jpg", "#top"]
    links += ["?C=N;O=D", "a.jpg", "sub/", "/in/e%20f.jpg", "mailto:a@b.c", "http://[/x.jpg", "%2e%2e/g.jpg", "closed/"]
    root = server.add("in", html(*links))
    server.add("in/sub/", html("b.jpg", "../", "../a.jpg", "note.txt", "&#104;.jpg"))
    server.add("in/closed/", Response(403))
    listing = Listing(root)
    names = [entry.path.removeprefix(f"{server.url}/in/") for entry in listing]
    assert names == ["a.jpg", "e%20f.jpg", "sub/b.jpg", "sub/h.jpg"]
    assert listing.other_files == {".txt": 1}
    assert listing.unlisted == {f"{root}/closed/": "HTTP 403 Forbidden"}
    assert storage.list_names(root) == ["a.jpg", "closed", "e%20f.jpg", "sub"]
    assert set(server.requests) == {"in", "in/sub/", "in/closed/"}


def test_a_url_that_is_no_page_is_one_file(server):
    url = server.add("a.jpg", GOOD)
    assert [entry.path for entry in Listing(url)] == [url]
    with pytest.raises(InputError, match=r"cannot list .*/absent: HTTP 404 Not Found"):
        list(Listing(f"{server.url}/absent"))


@pytest.mark.parametrize(("limit", "value"), [("MAX_PAGES", 5), ("MAX_LINKS", 9)])
def test_pages_without_end_are_refused(limit, value, server, monkeypatch):
    monkeypatch.setattr(http_listing, limit, value)
    monkeypatch.setattr(server, "respond", lambda path: (server.requests.update([path]), html("a/", "b.jpg"))[1])
    with pytest.raises(InputError, match=r"cannot list .*/in: more than .* folders or .* links; choose a folder below"):
        list(Listing(f"{server.url}/in"))
    assert len(server.requests) <= 10


# Other file systems of fsspec


def test_a_store_is_asked_for_no_more_than_the_limit(memory, monkeypatch):
    endless = lambda self, path, start, end: bytes(end - start)  # noqa: E731
    monkeypatch.setattr(MemoryFileSystem, "cat_file", endless)
    assert read(f"{memory}/a.jpg", limit_bytes=1000)[0].status == "too_large"
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    with pytest.raises(InputError, match="1001 bytes, more than the 1000 bytes"):
        storage.read_bytes(f"{memory}/a.jpg")


def test_an_empty_file_is_read_although_its_store_has_no_such_range(memory, monkeypatch):
    fail(monkeypatch, "cat_file", ServiceError("Requested Range Not Satisfiable", code=416))
    assert read(f"{memory}/a.jpg")[0].content == b""


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
    assert read(f"{memory}/a.jpg", limit_bytes=1000)[0].status == "too_large"


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


@pytest.mark.parametrize(
    "scheme",
    [
        *("ftp", "sftp", "github", "zip", "tar", "reference", "hdfs", "webhdfs", "jupyter", "dir", "local", "FILE"),
        *("simplecache::http", "s3a", "data", "nosuchscheme"),
    ],
)
def test_a_scheme_that_is_not_named_is_refused_in_one_line(scheme):
    expected = f"cannot open {scheme}://host/path: expected a local path or one of the schemes s3, http, https, gs"
    with pytest.raises(InputError, match=expected):
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
