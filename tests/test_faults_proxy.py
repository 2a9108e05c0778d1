"""The proxy that breaks S3 for us: each fault as a client meets it, and everything else untouched."""

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
        pytest.skip("the store is a real one: nothing of it is to be broken")
    with FaultProxy(s3_server, seed=1) as started:
        yield started


@pytest.fixture
def client(proxy):
    proxy.reset(seed=1)
    config = Config(retries={"max_attempts": 0}, read_timeout=1, connect_timeout=5, s3={"addressing_style": "path"})
    opened = boto3.client("s3", endpoint_url=proxy.endpoint, config=config)
    yield opened
    opened.close()


def body(client, bucket, key):
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def code(call, **arguments):
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"], caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


def raw_request(client, bucket, key):
    """Ask for an object without a client's checks."""
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    connection.request("GET", url.partition(urlsplit(url).netloc)[2])
    return connection


def raw_get(client, bucket, key):
    """Read an object; the answer and what came of its body."""
    connection = raw_request(client, bucket, key)
    answer = connection.getresponse()
    try:
        return answer, answer.read(), None
    except (OSError, http.client.HTTPException) as error:
        return answer, getattr(error, "partial", b""), error
    finally:
        connection.close()


@pytest.mark.parametrize("key", ["a b+c.jpg", "100%.jpg", "%41.jpg", "what?x=1.jpg", "é日本/[x]#.jpg", "a//b.jpg"])
def test_without_faults_keys_and_bodies_pass_unchanged(proxy, client, bucket, key):
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


def test_uploads_in_parts_and_as_streams_pass(proxy, client, bucket, tmp_path):
    big = tmp_path / "big.bin"
    big.write_bytes(CONTENT * 1000)
    client.upload_file(str(big), bucket, "big.bin")
    assert body(client, bucket, "big.bin") == big.read_bytes()
    assert proxy.counts.by_kind["post"] == 2
    with big.open("rb") as stream:
        client.put_object(Bucket=bucket, Key="stream.bin", Body=stream)
    assert body(client, bucket, "stream.bin") == big.read_bytes()


def test_a_share_of_chosen_methods_is_slowed_down(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("slow_down", methods={"GET"}, probability=0.5)]
    results = []
    for _ in range(60):
        try:
            results.append(body(client, bucket, "x.jpg") == CONTENT)
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
def test_refusals_hit_the_chosen_keys_alone(proxy, client, bucket, put, what, expected):
    put("x.jpg", CONTENT)
    put("y.jpg", CONTENT)
    proxy.faults = [Fault(what, kinds={"image"}, keys={"x.jpg"})]
    assert code(client.get_object, Bucket=bucket, Key="x.jpg") == expected
    assert body(client, bucket, "y.jpg") == CONTENT
    assert {item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]} == {"x.jpg", "y.jpg"}


def test_a_refused_upload_stores_nothing(proxy, client, bucket):
    proxy.faults = [Fault("slow_down", kinds={"put"}, total=1)]
    assert code(client.put_object, Bucket=bucket, Key="x.bin", Body=CONTENT) == ("SlowDown", 503)
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    client.put_object(Bucket=bucket, Key="x.bin", Body=CONTENT)
    assert body(client, bucket, "x.bin") == CONTENT


def test_a_token_expires_after_so_many_images_until_it_is_switched_off(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    expired = Fault("expired_token", after_images=2)
    proxy.faults = [expired]
    assert [body(client, bucket, "x.jpg") for _ in range(2)] == [CONTENT] * 2
    assert code(client.get_object, Bucket=bucket, Key="x.jpg") == ("ExpiredToken", 400)
    assert code(client.list_objects_v2, Bucket=bucket) == ("ExpiredToken", 400)
    expired.active = False
    assert body(client, bucket, "x.jpg") == CONTENT
    assert expired.injected == 2


def test_the_first_requests_of_each_key_and_a_total_bound_a_fault(proxy, client, bucket, put):
    for key in ("x.jpg", "y.jpg", "z.jpg"):
        put(key, CONTENT)
    proxy.faults = [Fault("slow_down", first=1, total=2)]
    codes = [raw_get(client, bucket, key)[0].status for key in ("x.jpg", "x.jpg", "y.jpg", "z.jpg")]
    assert codes == [503, 200, 503, 200]


def test_a_body_breaks_off_where_its_length_says_more(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("cut", kinds={"image"}, first=1, at_byte=100)]
    answer, came, error = raw_get(client, bucket, "x.jpg")
    assert int(answer.headers["Content-Length"]) == len(CONTENT)
    assert (came, type(error)) == (CONTENT[:100], http.client.IncompleteRead)
    assert body(client, bucket, "x.jpg") == CONTENT
    assert proxy.counts.gets_by_key == {"x.jpg": 2}


def test_a_short_body_looks_whole(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("short", kinds={"image"}, at_byte=100)]
    answer, came, error = raw_get(client, bucket, "x.jpg")
    assert (answer.headers["Content-Length"], came, error) == ("100", CONTENT[:100], None)


def test_a_connection_is_reset_in_the_middle(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("reset", kinds={"image"}, at_byte=100)]
    _, _, error = raw_get(client, bucket, "x.jpg")
    assert isinstance(error, ConnectionResetError)


def test_a_slow_body_comes_byte_by_byte(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    proxy.faults = [Fault("slow", kinds={"image"}, total=1)]
    connection = raw_request(client, bucket, "x.jpg")
    answer, started = connection.getresponse(), time.monotonic()
    assert answer.read(2) == CONTENT[:2]
    assert 0.8 < time.monotonic() - started < 3
    connection.close()
    assert body(client, bucket, "x.jpg") == CONTENT


def test_an_object_is_replaced_after_it_was_listed(proxy, client, bucket, put):
    put("x.jpg", CONTENT)
    put("new/x.jpg", b"new")
    proxy.faults = [Fault("replaced", kinds={"image"}, keys={"x.jpg"}, instead="new/x.jpg")]
    listed = {item["Key"]: item for item in client.list_objects_v2(Bucket=bucket)["Contents"]}
    found = client.get_object(Bucket=bucket, Key="x.jpg")
    assert found["Body"].read() == b"new"
    assert found["ETag"] != listed["x.jpg"]["ETag"]
