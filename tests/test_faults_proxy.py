"""The S3 fault proxy: each fault as a client sees it, and all other requests unchanged."""

import http.client
import time
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from benchmarks.faults.proxy import Fault, FaultProxy

CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def proxy(s3_server):
    if s3_server is None:
        pytest.skip("faults cannot be injected: CATSDOGS_TEST_BUCKET is a real store")
    with FaultProxy(s3_server, seed=1) as started:
        yield started


@pytest.fixture
def client(proxy):
    proxy.reset(seed=1)
    config = Config(retries={"max_attempts": 0}, read_timeout=1, connect_timeout=5, s3={"addressing_style": "path"})
    opened = boto3.client("s3", endpoint_url=proxy.endpoint, config=config)
    yield opened
    opened.close()


def read_object(client, bucket, key):
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def get_error(call, **arguments):
    """Return the error code and the HTTP status of a call that fails."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"], caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


def raw_request(client, bucket, key):
    """Request an object without the checks of boto3."""
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    connection.request("GET", url.partition(urlsplit(url).netloc)[2])
    return connection


def raw_get(client, bucket, key):
    """Read an object without the checks of boto3; the response, the body as far as it was received, the error."""
    connection = raw_request(client, bucket, key)
    response = connection.getresponse()
    try:
        return response, response.read(), None
    except (OSError, http.client.HTTPException) as error:
        return response, getattr(error, "partial", b""), error
    finally:
        connection.close()


@pytest.mark.parametrize("key", ["a b+c.jpg", "100%.jpg", "%41.jpg", "what?x=1.jpg", "é日本/[x]#.jpg", "a//b.jpg"])
def test_without_faults_keys_and_bodies_are_unchanged(proxy, client, bucket, key):
    client.put_object(Bucket=bucket, Key=key, Body=CONTENT, Metadata={"kind": "x"})
    found = client.get_object(Bucket=bucket, Key=key)
    assert (found["Body"].read(), found["Metadata"]) == (CONTENT, {"kind": "x"})
    assert [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]] == [key]
    assert client.head_object(Bucket=bucket, Key=key)["ContentLength"] == len(CONTENT)
    client.delete_object(Bucket=bucket, Key=key)
    assert proxy.counts.by_kind == {"put": 1, "image": 1, "list": 1, "head": 1, "delete": 1}
    assert proxy.counts.by_method == {"PUT": 1, "GET": 2, "HEAD": 1, "DELETE": 1}
    assert proxy.counts.gets_by_key == {key: 1}
    assert not proxy.counts.injected


def test_multipart_and_streamed_uploads_are_unchanged(proxy, client, bucket, tmp_path):
    big = tmp_path / "big.bin"
    big.write_bytes(CONTENT * 1000)
    client.upload_file(str(big), bucket, "big.bin")
    assert read_object(client, bucket, "big.bin") == big.read_bytes()
    assert proxy.counts.by_kind["post"] == 2
    with big.open("rb") as stream:
        client.put_object(Bucket=bucket, Key="stream.bin", Body=stream)
    assert read_object(client, bucket, "stream.bin") == big.read_bytes()


def test_a_share_of_the_chosen_methods_is_slowed_down(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("slow_down", methods={"GET"}, probability=0.5)]
    results = []
    for _ in range(60):
        try:
            results.append(read_object(client, bucket, "x.jpg") == CONTENT)
        except ClientError as error:
            results.append(error.response["Error"]["Code"])
    assert set(results) == {True, "SlowDown"}
    assert 15 < results.count("SlowDown") < 45
    assert proxy.counts.injected == {"slow_down": results.count("SlowDown")}
    client.head_object(Bucket=bucket, Key="x.jpg")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("internal_error", ("InternalError", 500)),
        ("access_denied", ("AccessDenied", 403)),
        ("no_such_key", ("NoSuchKey", 404)),
    ],
)
def test_errors_hit_only_the_chosen_keys(proxy, client, bucket, put, what, expected):
    put("x.jpg", CONTENT)
    put("y.jpg", CONTENT)
    proxy.faults = [Fault(what, kinds={"image"}, keys={"x.jpg"})]
    assert get_error(client.get_object, Bucket=bucket, Key="x.jpg") == expected
    assert read_object(client, bucket, "y.jpg") == CONTENT
    assert {item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]} == {"x.jpg", "y.jpg"}


def test_a_refused_upload_stores_nothing(proxy, client, bucket):
    proxy.faults = [Fault("slow_down", kinds={"put"}, total=1)]
    assert get_error(client.put_object, Bucket=bucket, Key="x.bin", Body=CONTENT) == ("SlowDown", 503)
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    client.put_object(Bucket=bucket, Key="x.bin", Body=CONTENT)
    assert read_object(client, bucket, "x.bin") == CONTENT


def test_a_token_is_expired_after_n_images_until_the_fault_is_switched_off(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    expired = Fault("expired_token", after_images=2)
    proxy.faults = [expired]
    assert [read_object(client, bucket, "x.jpg") for _ in range(2)] == [CONTENT] * 2
    assert get_error(client.get_object, Bucket=bucket, Key="x.jpg") == ("ExpiredToken", 400)
    assert get_error(client.list_objects_v2, Bucket=bucket) == ("ExpiredToken", 400)
    expired.active = False
    assert read_object(client, bucket, "x.jpg") == CONTENT
    assert expired.injected == 2


def test_a_fault_is_limited_per_key_and_in_total(proxy, client, bucket, put):
    for key in ("x.jpg", "y.jpg", "z.jpg"):
        put(key, CONTENT)
    proxy.faults = [Fault("slow_down", first=1, total=2)]
    codes = [raw_get(client, bucket, key)[0].status for key in ("x.jpg", "x.jpg", "y.jpg", "z.jpg")]
    assert codes == [503, 200, 503, 200]


def test_a_cut_body_is_shorter_than_its_content_length(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("cut", kinds={"image"}, first=1, at_byte=100)]
    response, received, error = raw_get(client, bucket, "x.jpg")
    assert int(response.headers["Content-Length"]) == len(CONTENT)
    assert (received, type(error)) == (CONTENT[:100], http.client.IncompleteRead)
    assert read_object(client, bucket, "x.jpg") == CONTENT
    assert proxy.counts.gets_by_key == {"x.jpg": 2}


def test_a_short_body_matches_its_content_length(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("short", kinds={"image"}, at_byte=100)]
    response, received, error = raw_get(client, bucket, "x.jpg")
    assert (response.headers["Content-Length"], received, error) == ("100", CONTENT[:100], None)


def test_a_connection_is_reset_within_a_body(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("reset", kinds={"image"}, at_byte=100)]
    _, _, error = raw_get(client, bucket, "x.jpg")
    assert isinstance(error, ConnectionResetError)


def test_a_slow_body_is_sent_at_one_byte_per_second(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("slow", kinds={"image"}, total=1)]
    connection = raw_request(client, bucket, "x.jpg")
    start = time.monotonic()
    assert connection.getresponse().read(2) == CONTENT[:2]
    assert time.monotonic() - start > 0.99
    connection.close()
    assert read_object(client, bucket, "x.jpg") == CONTENT


def test_an_object_is_replaced_after_it_was_listed(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    put("new/x.jpg", b"new")
    proxy.faults = [Fault("replaced", kinds={"image"}, keys={"x.jpg"}, instead="new/x.jpg")]
    listed = {item["Key"]: item for item in client.list_objects_v2(Bucket=bucket)["Contents"]}
    found = client.get_object(Bucket=bucket, Key="x.jpg")
    assert found["Body"].read() == b"new"
    assert found["ETag"] != listed["x.jpg"]["ETag"]
