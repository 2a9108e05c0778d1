"""GETs of S3 objects without the layers of the client: the same requests, results and errors as through the client."""

import asyncio
import base64
import contextlib
import cProfile
import http.server
import json
import re
import sys
import textwrap
import threading
import zlib
from collections.abc import Iterator

import pytest
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.awsrequest import AWSPreparedRequest
from forked import run_forked

from catsdogs.storage import s3, s3_gets
from catsdogs.storage.s3_gets import ObjectGets

CONTENT = b"content"
CRC32 = base64.b64encode(zlib.crc32(CONTENT).to_bytes(4, "big")).decode()
CODE = """
import json, sys
from catsdogs import storage
from catsdogs.errors import CatsdogsError
from catsdogs.storage import Entry, retrying

retrying.MAX_ATTEMPTS, retrying.MAX_DELAY_S = 2, 0.02
for uri in json.loads(sys.argv[1]):
    try:
        file = storage.fetch([Entry(uri)])[0]
        print(json.dumps([file.status, (file.content or b"").decode(), file.error, file.version, file.retries]))
    except CatsdogsError as error:
        print(json.dumps([str(error)]))
"""


class Store:
    """A server that has every key; some keys of all buckets have other responses."""

    def __init__(self, server: http.server.HTTPServer) -> None:
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self.responses: dict[str, tuple[int, dict[str, str], bytes]] = {}  # by the last part of the path
        self.region = ""  # other regions in a signature are refused
        self.requests: list[tuple[str, dict[str, str]]] = []

    def respond(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if "list-type" in path:  # the probe of a retry
            return 200, {}, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        self.requests.append((path, headers))
        if self.region not in headers["authorization"]:
            code = f"<Code>AuthorizationHeaderMalformed</Code><Region>{self.region}</Region>"
            return 400, {"x-amz-bucket-region": self.region}, f"<Error>{code}</Error>".encode()
        return self.responses.get(path.rpartition("/")[2], (200, {"ETag": '"e"'}, CONTENT))

    def fetch(self, *uris: str, **environment: str) -> list[list[object]]:
        """Read files, one after the other, in a process of its own."""
        printed = run_forked(CODE, json.dumps(uris), **{"AWS_ENDPOINT_URL_S3": self.endpoint} | environment)
        return [json.loads(line) for line in printed.splitlines()]

    @property
    def through_client(self) -> list[bool]:
        return ["amz-sdk-invocation-id" in headers for _, headers in self.requests]


@pytest.fixture
def store() -> Iterator[Store]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, headers, body = started.respond(self.path, headers)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    started = Store(server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield started
    server.shutdown()
    thread.join()
    server.server_close()


KEYS = [
    "a.jpg",
    "a b+c&d=e.jpg",
    "a//b.jpg",
    "/a.jpg",
    "../a/./b.jpg",
    "ä%20é.jpg",
    "a?b#c.jpg",
    "a\nb.jpg",
    "a~'(1).jpg",
]
VOLATILE = {"amz-sdk-invocation-id", "amz-sdk-request", "authorization", "x-amz-date"}


def test_a_get_has_the_address_and_the_headers_of_the_clients(store):
    found = store.fetch(*(f"s3://bucket-{i}/{key}" for i, key in enumerate(KEYS) for _ in range(2)))
    assert found == [["ok", "content", None, "e", 0]] * 2 * len(KEYS)
    assert store.through_client == [True, False] * len(KEYS)
    for (path, sent), (direct_path, direct) in zip(store.requests[::2], store.requests[1::2], strict=True):
        assert direct_path == path
        fixed = {name: value for name, value in sent.items() if name not in VOLATILE}
        assert {name: value for name, value in direct.items() if name not in VOLATILE} == fixed
        assert direct["authorization"].split("SignedHeaders")[0] == sent["authorization"].split("SignedHeaders")[0]


def test_a_checksum_mode_that_the_user_sets_is_kept(store):
    store.fetch("s3://bucket/a.jpg", "s3://bucket/a.jpg", AWS_RESPONSE_CHECKSUM_VALIDATION="when_required")
    assert store.through_client == [True, False]
    assert not any("x-amz-checksum-mode" in headers for _, headers in store.requests)


class SentError(Exception):
    """Raised instead of sending a request."""


class Recorder:
    """An HTTP session that sends nothing."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.scopes: list[list[str]] = []  # of the signatures

    async def send(self, request: AWSPreparedRequest, **_: object) -> None:
        self.urls.append(request.url)
        self.scopes.append(re.findall("Credential=([^,]+)", str(request.headers["authorization"])))
        raise SentError


SETTINGS = {
    "us-east-1": {},
    "eu-central-1": {},
    "accelerate": {"s3": {"use_accelerate_endpoint": True}},
    "dual stack": {"s3": {"use_dualstack_endpoint": True}},
    "path style": {"s3": {"addressing_style": "path"}},
}


@pytest.mark.parametrize("bucket", ["photos", "photos.example", "arn:aws:s3:eu-west-3:123456789012:accesspoint/photos"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_style_of_address_is_that_of_the_client(name, bucket, monkeypatch):
    if name == "accelerate" and bucket != "photos":
        pytest.skip("S3 Accelerate needs a plain name")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)

    async def send_two() -> Recorder:
        recorder = Recorder()
        region = name if name in ("us-east-1", "eu-central-1") else "us-west-2"
        config = AioConfig(region_name=region, **SETTINGS[name])
        async with AioSession().create_client("s3", config=config) as client:
            client.meta.events.register("before-send.s3.GetObject", recorder.send)
            gets = ObjectGets(client, recorder)
            for _ in range(2):
                with pytest.raises(SentError):
                    await gets.get_object(Bucket=bucket, Key="a b/c.jpg")
                client.meta.events.unregister("before-send.s3.GetObject", recorder.send)
        return recorder

    recorder = asyncio.run(send_two())
    assert recorder.urls[0].endswith("/a%20b/c.jpg")
    assert recorder.urls[0] == recorder.urls[1]
    assert recorder.scopes[0] == recorder.scopes[1] != []


def xml(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()


RESPONSES = {
    "refused": (403, {}, xml("AccessDenied")),
    "refused-without-body": (403, {}, b""),
    "gone": (404, {}, xml("NoSuchKey")),
    "gone-without-body": (404, {}, b""),
    "no-bucket": (404, {}, xml("NoSuchBucket")),
    "archived": (403, {}, xml("InvalidObjectState")),
    "precondition": (412, {}, xml("PreconditionFailed")),
    "argument": (400, {}, xml("InvalidArgument")),
    "error": (500, {}, xml("InternalError")),
    "no-xml": (500, {}, b"<html>busy"),
    "not-implemented": (501, {}, xml("NotImplemented")),
    "expired": (400, {}, xml("ExpiredToken")),
    "no-content": (204, {}, b""),
    "no-etag": (200, {}, CONTENT),
    "md5": (200, {"ETag": f'"{"0" * 32}"'}, CONTENT),
    "crc32": (200, {"ETag": '"e"', "x-amz-checksum-crc32": CRC32}, CONTENT),
    "wrong-crc32": (200, {"ETag": '"e"', "x-amz-checksum-crc32": "AAAAAA=="}, CONTENT),
    "wrong-sha256": (200, {"ETag": '"e"', "x-amz-checksum-sha256": "AAAA"}, CONTENT),
    "crc32-of-parts": (200, {"ETag": '"e"', "x-amz-checksum-crc32": "AAAAAA==-2"}, CONTENT),
}


def test_every_response_has_the_result_that_it_has_through_the_client(store):
    store.responses = RESPONSES
    through_client = store.fetch(*(f"s3://{name}/{name}" for name in RESPONSES))
    assert sum(store.through_client) == len(RESPONSES)
    store.requests.clear()
    first, *direct = store.fetch("s3://bucket/a.jpg", *(f"s3://bucket/{name}" for name in RESPONSES))
    assert first[0] == "ok"
    found = dict(zip(RESPONSES, direct, strict=True))
    assert found == dict(zip(RESPONSES, through_client, strict=True))
    assert [found[name][0] for name in ("refused", "gone", "error", "crc32")] == [
        *("access_denied", "not_found", "read_error", "ok")
    ]
    assert "did not match calculated checksum" in str(found["wrong-crc32"][2])
    assert sum(store.through_client) == 1


def test_a_bucket_in_another_region_is_redirected_by_the_client(store):
    uris = ["s3://bucket/a.jpg"] * 3
    store.fetch(*uris)
    assert store.through_client == [True, False, False]
    store.requests.clear()
    store.region = "eu-west-3"
    assert [row[:2] for row in store.fetch(*uris)] == [["ok", "content"]] * 3
    assert store.through_client[-3:] == [True, False, False]
    assert all("eu-west-3" in headers["authorization"] for _, headers in store.requests[-3:])


def test_credentials_are_renewed(store, tmp_path):
    """They are renewed before each request, because they expire in less than 10 minutes."""
    program = tmp_path / "credentials.py"
    program.write_text(
        textwrap.dedent(f"""
        import datetime, json, pathlib
        count = pathlib.Path({str(tmp_path / "count")!r})
        count.write_text(str(int(count.read_text()) + 1) if count.exists() else "1")
        expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
        keys = dict(AccessKeyId="key" + count.read_text(), SecretAccessKey="secret", SessionToken="token")
        print(json.dumps(dict(keys, Version=1, Expiration=expiry.isoformat())))
        """)
    )
    config = tmp_path / "config"
    config.write_text(f"[profile renewed]\ncredential_process = {sys.executable} {program}\n")
    environment = {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "renewed", "AWS_ACCESS_KEY_ID": ""}
    found = store.fetch(*["s3://bucket/a.jpg"] * 3, **environment)
    assert [row[0] for row in found] == ["ok"] * 3
    assert store.through_client == [True, False, False]
    used = [headers["authorization"].split("/")[0].rpartition("=")[2] for _, headers in store.requests]
    assert len(set(used)) == 3
    assert {headers["x-amz-security-token"] for _, headers in store.requests} == {"token"}


def test_the_proxy_of_the_environment_is_used(store):
    found = store.fetch(
        *["s3://bucket/a.jpg"] * 2,
        AWS_ENDPOINT_URL_S3="http://store.invalid",
        HTTP_PROXY=store.endpoint,
        http_proxy=store.endpoint,
        NO_PROXY="",
        no_proxy="",
    )
    assert [row[0] for row in found] == ["ok"] * 2
    assert store.through_client == [True, False]
    assert [path for path, _ in store.requests] == ["http://store.invalid/bucket/a.jpg"] * 2


def test_the_plain_client_can_be_selected(store):
    found = store.fetch(*["s3://bucket/a.jpg"] * 3, CATSDOGS_PLAIN_S3="1")
    assert found == [["ok", "content", None, "e", 0]] * 3
    assert store.through_client == [True, True, True]


class Calls:
    """Stands for the store: it gets no request, and notes which came through the client."""

    def __init__(self) -> None:
        self.through_client: list[bool] = []
        self.num_calls: list[int] = []  # of Python functions, before each request

    async def send(self, request: AWSPreparedRequest, **_: object) -> None:
        self.through_client.append("amz-sdk-invocation-id" in request.headers)
        raise SentError


async def get_twice(event: dict[str, object] | None = None) -> Calls:
    """Get an object twice, if `event` is set after an event of another version of the client."""
    calls = Calls()
    async with AioSession().create_client("s3", region_name="us-east-1") as client:
        client.meta.events.register("before-send.s3.GetObject", calls.send)
        with pytest.MonkeyPatch.context() as patch:
            if s3_gets.AIOHTTPSession is AIOHTTPSession:
                patch.setattr(s3_gets, "AIOHTTPSession", lambda **_: contextlib.nullcontext(calls))
            get_object = await s3.open_gets(client, AioSession())
        if event is not None:
            with contextlib.suppress(TypeError):  # of the client's handlers, which miss arguments, too
                await client.meta.events.emit("before-sign.s3.GetObject", **event)
        for _ in range(2):
            with count_calls(calls.num_calls), pytest.raises(SentError):
                await get_object(Bucket="photos", Key="a.jpg")
    return calls


@contextlib.contextmanager
def count_calls(counts: list[int]) -> Iterator[None]:
    profile = cProfile.Profile()
    with profile:
        yield
    counts.append(sum(entry.callcount for entry in profile.getstats()))


@pytest.mark.parametrize("name", ["AWSRequest", "AIOHTTPSession"])
def test_a_class_of_another_version_of_the_client_is_not_used(name, monkeypatch, caplog):
    monkeypatch.setattr(s3_gets, name, lambda: None)
    assert asyncio.run(get_twice()).through_client == [True, True]
    assert ["aiobotocore has changed" in record.message for record in caplog.records] == [True]


def test_an_event_of_another_version_of_the_client_is_not_used(caplog):
    assert asyncio.run(get_twice({"signature_version": "s3v4"})).through_client == [True, True]
    assert ["aiobotocore has changed" in record.message for record in caplog.records] == [True]


def test_the_client_still_makes_twice_as_many_calls():
    """If this fails, the module is not worth its lines any more."""
    calls = asyncio.run(get_twice())
    assert calls.through_client == [True, False]
    assert calls.num_calls[0] > 2 * calls.num_calls[1]
