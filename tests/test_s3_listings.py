"""Listings and bodies of stores that speak S3, but not quite: each bucket of the server has one fault."""

import http.server
import json
import re
import threading
import time
import urllib.parse

import pytest
from forked import Forked

from catsdogs import storage
from catsdogs.errors import InputError

PAGES: dict[str, list[list[str]]] = {  # the keys of each page
    "good": [["in/a.jpg", "in/b.jpg"], [], ["in/c.jpg"]],
    "unsorted": [["in/a.jpg", "in/c.jpg", "in/b.jpg"], ["in/d.jpg"]],
    "unsorted-pages": [["in/b.jpg"], ["in/a.jpg"], ["in/c.jpg"]],
    "twice": [["in/a.jpg"], ["in/a.jpg"], ["in/b.jpg"]],
    "case": [["in/a.jpg", "in/B.jpg"]],
    "outside": [["in/a.jpg", "secret/b.jpg"]],
    "no-token": [["in/a.jpg"], ["in/b.jpg"]],
    "same-token": [["in/a.jpg"], ["in/b.jpg"], ["in/c.jpg"]],
    "lossy-token": [["in/a.jpg"], ["in/b.jpg"]],
    "empty-pages": [[] for _ in range(5000)],
    "no-size": [["in/a.jpg"]],
    "no-etag": [["in/a.jpg"]],
    "endless": [["in/a.jpg"]],
    "longer": [["in/a.jpg"]],
    "same-etag": [["in/a.jpg"]],
    "slow": [["in/a.jpg"]],
}
MALFORMED = {  # the XML of the first page
    "no-key": "<Contents><Size>5</Size></Contents>",
    "empty-item": "<Contents/>",
    "two-keys": "<Contents><Key>in/a.jpg</Key><Key>in/b.jpg</Key></Contents>",
    "word-as-size": "<Contents><Key>in/a.jpg</Key><Size>abc</Size></Contents>",
    "two-sizes": "<Contents><Key>in/a.jpg</Key><Size>1</Size><Size>2</Size></Contents>",
    "huge-size": f"<Contents><Key>in/a.jpg</Key><Size>{'9' * 30}</Size></Contents>",
    "endless-size": f"<Contents><Key>in/a.jpg</Key><Size>{'9' * 5000}</Size></Contents>",
    "negative-size": "<Contents><Key>in/a.jpg</Key><Size>-1</Size></Contents>",
    "two-etags": "<Contents><Key>in/a.jpg</Key><ETag>e</ETag><ETag>f</ETag></Contents>",
    "no-date": "<Contents><Key>in/a.jpg</Key><LastModified>soon</LastModified></Contents>",
    "huge-date": f"<Contents><Key>in/a.jpg</Key><LastModified>{'9' * 30}</LastModified></Contents>",
    "two-dates": "<Contents><Key>in/a.jpg</Key><LastModified>1</LastModified><LastModified>2</LastModified></Contents>",
    "no-prefix": "<CommonPrefixes/>",
    "two-tokens": "<NextContinuationToken>a</NextContinuationToken><NextContinuationToken>b</NextContinuationToken>",
}
PAGES |= {bucket: [] for bucket in MALFORMED}
FAULTS = {
    "unsorted": "lists 'in/b.jpg' after 'in/c.jpg', not in the order of their bytes",
    "unsorted-pages": "lists 'in/a.jpg' after 'in/b.jpg', not in the order of their bytes",
    "twice": "lists 'in/a.jpg' after 'in/a.jpg', not in the order of their bytes",
    "case": "lists 'in/B.jpg' after 'in/a.jpg', not in the order of their bytes",
    "outside": "lists 'secret/b.jpg', which is not below the prefix",
    "no-token": "says that more keys follow, and sends no continuation token",
    "same-token": "repeats a continuation token after 1 pages",
    "lossy-token": "sends a continuation token that lost a character of a key",
    "empty-pages": "sends 1,001 pages without keys",
}
# Lists every bucket of the arguments, the first of which is a list of the malformed ones; prints, for each, the error
# or the entries with what reading them gives.
CODE = """
import json, sys
from catsdogs import storage
from catsdogs.errors import CatsdogsError
from catsdogs.storage import limits, reading

reading.MAX_FILE_BYTES, found = 1000, {}
for name in sys.argv[2:]:
    limits.DEADLINE_S = 2.0 if name == "slow" else 900.0
    try:
        entries = list(storage.Listing(f"s3://{name}/in"))
        files = storage.fetch(entries, 1000)
        found[name] = [[e.path, e.size_bytes, e.version, f.status, f.error] for e, f in zip(entries, files)]
    except CatsdogsError as error:
        found[name] = f"{type(error).__name__}: {error}"
limits.DEADLINE_S = 900.0
for name, read in (("read", storage.read_bytes), ("version", storage.read_versioned), ("names", storage.list_names)):
    for bucket in ("endless", "no-etag", "same-token", *(json.loads(sys.argv[1]) if name == "names" else ())):
        try:
            found[f"{name} {bucket}"] = str(read(f"s3://{bucket}/in" + ("" if name == "names" else "/a.jpg")))
        except CatsdogsError as error:
            found[f"{name} {bucket}"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class _Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append(self.path)
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = url.path.strip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(url.query))
        if key:
            self._send_object(bucket)
        elif bucket == "slow":
            self._trickle()
        else:
            self._send(self._format_page(bucket, int(query.get("continuation-token", "0") or 0)).encode())

    def _format_page(self, bucket: str, number: int) -> str:
        if bucket in MALFORMED:
            return f"<ListBucketResult><IsTruncated>false</IsTruncated>{MALFORMED[bucket]}</ListBucketResult>"
        pages = PAGES[bucket]
        size = "" if bucket == "no-size" else "<Size>5</Size>"
        etag = "" if bucket == "no-etag" else '<ETag>"e"</ETag>'
        keys = "".join(f"<Contents><Key>{key}</Key>{size}{etag}</Contents>" for key in pages[number])
        more = number + 1 < len(pages)
        following = {"same-token": "1", "lossy-token": "in/\ufffd"}.get(bucket, number + 1)
        token = f"<NextContinuationToken>{following}</NextContinuationToken>"
        token = token if more and bucket != "no-token" else ""
        truncated = f"<IsTruncated>{str(more).lower()}</IsTruncated>"
        return f'<?xml version="1.0"?><ListBucketResult>{truncated}{token}{keys}</ListBucketResult>'

    def _send(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_object(self, bucket: str) -> None:
        if bucket not in ("endless", "same-etag"):
            content = b"longer than listed" if bucket == "longer" else b"whole"
            self._send(content, **({} if bucket == "no-etag" else {"ETag": '"e"'}))
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        if bucket == "same-etag":
            self.send_header("ETag", '"e"')
        self.end_headers()
        self._repeat(b"400\r\n" + bytes(1024) + b"\r\n", 0.0)

    def _trickle(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self._repeat(b" ", 0.2)

    def _repeat(self, piece: bytes, delay_s: float) -> None:
        try:
            while True:
                self.wfile.write(piece)
                time.sleep(delay_s)
        except OSError:  # the client has closed the connection
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def found() -> dict:
    """What a process finds in every bucket."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with Forked(CODE, json.dumps(list(MALFORMED)), *PAGES, AWS_ENDPOINT_URL_S3=endpoint) as process:
        done = process.wait(180)
    server.shutdown()
    thread.join()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("bucket", "fault"), FAULTS.items(), ids=FAULTS)
def test_a_faulty_listing_is_an_error_that_says_what_the_store_does(bucket, fault, found):
    assert found[bucket].startswith("RunError: cannot list s3://")
    assert f"the store {fault}, unlike S3; " in found[bucket]


@pytest.mark.parametrize("bucket", MALFORMED)
def test_a_malformed_listing_is_an_error_in_one_line(bucket, found):
    for name in (bucket, f"names {bucket}"):
        assert found[name].startswith(f"RunError: cannot list s3://{bucket}/in")
        assert re.search("the store (lists|sends) .*, unlike S3; ", found[name])
        assert "\n" not in found[name]


def test_a_fault_is_found_at_the_page_that_shows_it(found):
    requested = [path.split("?")[0] for path in _Store.requests if "list-type" in path]
    counts = {bucket: sum(path.strip("/") == bucket for path in requested) for bucket in PAGES}
    expected = {"good": 3, "unsorted": 1, "unsorted-pages": 2, "twice": 2, "case": 1, "outside": 1, "no-token": 1}
    assert {bucket: counts[bucket] for bucket in expected} == expected
    assert counts["empty-pages"] == 1001


def test_an_empty_page_does_not_end_a_listing(found):
    assert [row[0] for row in found["good"]] == [f"s3://good/in/{name}.jpg" for name in "abc"]
    assert [row[1:] for row in found["good"]] == [[5, "e", "ok", None]] * 3


def test_an_unknown_size_or_etag_is_not_compared(found):
    assert found["no-size"] == [["s3://no-size/in/a.jpg", None, "e", "ok", None]]
    assert found["no-etag"] == [["s3://no-etag/in/a.jpg", 5, None, "ok", None]]


def test_a_listing_of_a_byte_now_and_then_ends(found):
    assert found["slow"].startswith("RunError: cannot list s3://slow/in: it took more than 2 s")


def test_a_body_of_unknown_length_has_a_limit(found):
    assert "more than the 1000 bytes that are read" in found["read endless"]
    status, error = found["endless"][0][3:]
    assert (status, re.sub(r"\d+ bytes", "N bytes", error)) == ("changed", "has at least N bytes, was listed with 5")
    assert found["read endless"].startswith("InputError: cannot read s3://endless/in/a.jpg: ")


def test_no_more_than_the_listed_size_is_read_although_the_etag_is_the_listed_one(found):
    assert found["longer"][0][3:] == ["changed", "has at least 18 bytes, was listed with 5"]
    assert found["same-etag"][0][3:] == ["changed", "has at least 6 bytes, was listed with 5"]


def test_a_file_without_an_etag_is_read_but_not_replaced(found):
    assert found["read no-etag"] == "b'whole'"
    assert found["version no-etag"].startswith("RunError: cannot read s3://no-etag/in/a.jpg to replace it: ")


def test_the_names_in_a_folder_end_too(found):
    assert "repeats a continuation token" in found["names same-token"]


def test_a_directory_bucket_is_refused_because_its_listing_has_no_order():
    with pytest.raises(InputError, match=r"expected a general purpose bucket, found a directory bucket"):
        storage.absolute("s3://photos--usw2-az1--x-s3/in")
