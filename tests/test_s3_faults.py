"""Storage through a store on a bad day: a proxy in front of it injects the faults."""

import asyncio
import time

import pytest
from botocore.exceptions import ClientError

from benchmarks.faults.proxy import Fault
from catsdogs import storage
from catsdogs.errors import RunError
from catsdogs.storage import Entry, Listing, objects, reading, retrying

CONTENT = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(retrying, "CAP_S", 0.02)


@pytest.fixture
def listed(bucket, put, s3_proxy):
    """Put ten images; as they are listed."""
    for i in range(10):
        put(f"in/{i}.jpg", CONTENT + bytes([i]))
    return list(Listing(f"s3://{bucket}/in"))


def key_of(entry):
    return entry.path.split("/", 3)[3]


def test_503_on_half_of_all_requests_loses_nothing(listed, bucket, s3_proxy):
    s3_proxy.reset(Fault("slow_down", probability=0.5))
    fetched = storage.fetch(listed)
    assert [row.image_bytes for row in fetched] == [CONTENT + bytes([i]) for i in range(10)]
    assert sum(row.retries for row in fetched) == s3_proxy.counts.injected["slow_down"] > 0
    assert [entry.path for entry in Listing(f"s3://{bucket}/in")] == [entry.path for entry in listed]
    for i in range(10):
        storage.write_bytes(f"s3://{bucket}/out/{i}", CONTENT)
    assert len(storage.list_names(f"s3://{bucket}/out")) == 10


def test_while_a_group_waits_for_its_slowest_file_the_next_are_read(listed, s3_proxy):
    s3_proxy.reset(Fault("slow_down", keys={key_of(listed[0])}, first=8))
    groups = storage.fetch_ahead([listed[:2], listed[2:4], listed[4:]])
    assert [row.image_bytes for row in next(groups)] == [CONTENT + bytes([i]) for i in range(2)]
    asked = s3_proxy.counts.gets_by_key.copy()
    assert [asked[key_of(entry)] for entry in listed] == [9] + [1] * 9
    assert [len(group) for group in groups] == [2, 6]
    assert s3_proxy.counts.gets_by_key == asked


def test_no_more_is_read_ahead_than_may_be_held(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD_BYTES", 2 * len(CONTENT))
    s3_proxy.reset()
    groups = storage.fetch_ahead([[entry] for entry in listed])
    next(groups)
    time.sleep(0.3)
    assert s3_proxy.counts.by_kind["image"] == 2
    groups.close()
    assert len(list(storage.fetch_ahead([[Entry(entry.path)] for entry in listed]))) == 10


def test_a_key_that_keeps_failing_is_a_row_and_no_others(listed, s3_proxy):
    s3_proxy.reset(Fault("internal_error", keys={key_of(listed[3])}))
    rows = storage.fetch(listed)
    assert [row.status for row in rows] == ["ok"] * 3 + ["read_error"] + ["ok"] * 6
    assert "InternalError" in rows[3].error
    assert s3_proxy.counts.gets_by_key[key_of(listed[3])] == retrying.MAX_ATTEMPTS


def test_a_throttled_key_is_asked_for_longer(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(retrying, "MAX_ATTEMPTS", 5)
    s3_proxy.reset(Fault("slow_down", keys={key_of(listed[3])}, first=20))
    assert [row.status for row in storage.fetch(listed)] == ["ok"] * 10
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.5)
    s3_proxy.reset(Fault("slow_down", keys={key_of(listed[3])}))
    assert [row.status for row in storage.fetch(listed)] == ["ok"] * 3 + ["read_error"] + ["ok"] * 6


@pytest.mark.parametrize("what", ["cut", "short", "reset"])
def test_a_body_that_breaks_off_is_read_again(what, listed, s3_proxy):
    s3_proxy.reset(Fault(what, kinds={"image"}, first=2, at_byte=1000))
    rows = storage.fetch(listed)
    assert [row.image_bytes for row in rows] == [CONTENT + bytes([i]) for i in range(10)]
    assert [row.retries for row in rows] == [2] * 10


@pytest.mark.parametrize("what", ["cut", "short", "reset"])
@pytest.mark.parametrize("known", [True, False])
def test_a_body_that_always_breaks_off_is_never_passed_on(what, known, listed, s3_proxy):
    s3_proxy.reset(Fault(what, keys={key_of(listed[0])}, kinds={"image"}, at_byte=1000))
    row = storage.fetch([listed[0] if known else Entry(listed[0].path)])[0]
    assert (row.status, row.image_bytes) == ("read_error", None)
    assert "the body" in row.error


def test_a_slow_body_is_given_up_and_asked_for_again(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(objects, "BODY_S", 0.5)
    s3_proxy.reset(Fault("slow", kinds={"image"}, first=1, total=3))
    began = time.monotonic()
    assert [row.status for row in storage.fetch(listed)] == ["ok"] * 10
    assert time.monotonic() - began < 10


def test_a_store_that_is_down_stops_the_job_and_makes_no_rows(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.5)
    s3_proxy.reset(Fault("slow_down"))
    with pytest.raises(RunError, match=r"the store does not answer: .*SlowDown.* check AWS_ENDPOINT_URL_S3"):
        storage.fetch(listed)


def test_refused_and_missing_keys_are_rows_at_once(listed, s3_proxy):
    s3_proxy.reset(Fault("access_denied", keys={key_of(listed[1])}), Fault("no_such_key", keys={key_of(listed[2])}))
    assert [row.status for row in storage.fetch(listed)][:4] == ["ok", "access_denied", "not_found", "ok"]
    assert s3_proxy.counts.by_method["GET"] == 10


def test_a_listing_that_breaks_off_is_read_again_and_never_taken_for_a_short_one(listed, bucket, s3_proxy):
    s3_proxy.reset(Fault("short", kinds={"list"}, total=1), Fault("short", kinds={"list"}, total=1, at_byte=200))
    assert [entry.path for entry in Listing(f"s3://{bucket}/in")] == [entry.path for entry in listed]
    s3_proxy.reset(Fault("short", kinds={"list"}))
    with pytest.raises(RunError, match="cannot list"):
        list(Listing(f"s3://{bucket}/in"))


def test_a_longer_object_than_wanted_is_not_read(listed, s3_proxy):
    for entry in (listed[0], Entry(listed[0].path)):
        row = storage.fetch([entry], 100)[0]
        assert (row.status, row.image_bytes) == ("decoder_crash", None)
        assert row.error.startswith("2049 bytes, more than")


def test_credentials_that_cannot_be_fetched_are_no_rows(listed, monkeypatch):
    async def refused(*_, **__):
        answer = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(answer, "AssumeRoleWithWebIdentity")

    monkeypatch.setattr(reading, "get_object", refused)
    with pytest.raises(RunError, match="credentials are missing, wrong or expired"):
        storage.fetch(listed)


def test_expired_credentials_stop_the_others_too(listed, s3_proxy):
    s3_proxy.reset(Fault("expired_token", after_images=5))
    with pytest.raises(RunError, match="ExpiredToken"):
        storage.fetch(listed)


def test_a_file_that_was_replaced_is_changed(listed, put, bucket):
    put("in/4.jpg", b"other")
    assert [row.status for row in storage.fetch(listed)][3:6] == ["ok", "changed", "ok"]


def test_one_get_an_image_and_no_head(listed, s3_proxy):
    s3_proxy.reset()
    storage.fetch(listed)
    assert dict(s3_proxy.counts.by_method) == {"GET": 10}


# Writes with a condition


def test_create_wants_nothing_there_and_replace_what_was_read(bucket):
    uri = f"s3://{bucket}/x"
    assert storage.create_bytes(uri, b"one")
    assert not storage.create_bytes(uri, b"two")
    content, version = storage.read_versioned(uri)
    assert content == b"one"
    assert storage.replace_bytes(uri, b"three", version)
    assert not storage.replace_bytes(uri, b"four", version)
    assert storage.read_bytes(uri) == b"three"
    storage.remove(uri)
    assert storage.read_versioned(uri) is None
    assert not storage.replace_bytes(uri, b"five", version)


def test_a_write_whose_answer_got_lost_is_known_as_ours(bucket, s3_proxy):
    uri = f"s3://{bucket}/x"
    s3_proxy.reset(Fault("reset", methods={"PUT"}, total=1))
    assert storage.create_bytes(uri, b"one")
    version = storage.read_versioned(uri)[1]
    s3_proxy.reset(Fault("reset", methods={"PUT"}, total=1))
    assert storage.replace_bytes(uri, b"two", version)
    assert s3_proxy.counts.injected["reset"] == 1
    assert storage.read_bytes(uri) == b"two"


def test_a_store_without_conditions_is_looked_at_first(bucket, monkeypatch):
    uri, real = f"s3://{bucket}/x", objects.request

    async def request(operation, read=None, **parameters):
        if {"IfMatch", "IfNoneMatch"} & parameters.keys():
            answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
            raise ClientError(answer, operation)
        return await real(operation, read, **parameters)

    monkeypatch.setattr(objects, "request", request)
    assert storage.create_bytes(uri, b"one")
    assert not storage.create_bytes(uri, b"two")
    version = storage.read_versioned(uri)[1]
    assert storage.replace_bytes(uri, b"two", version)
    assert not storage.replace_bytes(uri, b"three", version)
    assert storage.read_bytes(uri) == b"two"


@pytest.mark.parametrize(("moving_s", "capped"), [(1.0, [1.0] * 9), (0.0, [1.6, 3.2, *[5.0] * 7])])
def test_pauses_grow_and_stay_below_their_cap(moving_s, capped, monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    tries = iter(range(13))

    async def ask():
        tried = next(tries)
        if tried < 12:
            raise TimeoutError
        return tried

    async def probe():
        return None

    monkeypatch.setattr(retrying, "CAP_S", 5.0)
    monkeypatch.setattr(retrying, "MOVING_CAP_S", moving_s)
    monkeypatch.setattr(retrying.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(retrying.asyncio, "sleep", sleep)
    assert asyncio.run(retrying.with_retries(ask, probe)) == (12, 12)
    assert slept == [0.2, 0.4, 0.8, *capped]
