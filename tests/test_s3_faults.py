"""Storage through a proxy that injects faults between the client and the S3 server."""

import asyncio
import gc

import fsspec
import pytest
from botocore.exceptions import ClientError

from benchmarks.faults.proxy import Fault
from catsdogs import storage
from catsdogs.errors import RunError
from catsdogs.storage import Entry, Listing, fetching, objects, reading, retrying

CONTENT = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(retrying, "MAX_DELAY_S", 0.02)


@pytest.fixture
def listed(bucket, put, s3_proxy):
    """Put ten images and list them."""
    for i in range(10):
        put(f"in/{i}.jpg", CONTENT + bytes([i]))
    return list(Listing(f"s3://{bucket}/in"))


def get_key(entry):
    return entry.path.split("/", 3)[3]


def test_503_on_half_of_all_requests_loses_nothing(listed, bucket, s3_proxy):
    s3_proxy.reset(Fault("slow_down", probability=0.5))
    fetched = storage.fetch(listed)
    assert [row.content for row in fetched] == [CONTENT + bytes([i]) for i in range(10)]
    assert sum(row.retries for row in fetched) == s3_proxy.counts.injected["slow_down"] > 0
    assert [entry.path for entry in Listing(f"s3://{bucket}/in")] == [entry.path for entry in listed]
    for i in range(10):
        storage.write_bytes(f"s3://{bucket}/out/{i}", CONTENT)
    assert len(storage.list_names(f"s3://{bucket}/out")) == 10


def test_next_groups_are_read_while_a_group_waits_for_its_slowest_file(listed, s3_proxy):
    s3_proxy.reset(Fault("slow_down", keys={get_key(listed[0])}, first=8))
    groups = storage.fetch_ahead([listed[:2], listed[2:4], listed[4:]])
    assert [row.content for row in next(groups)] == [CONTENT + bytes([i]) for i in range(2)]
    requested = s3_proxy.counts.gets_by_key.copy()
    assert [requested[get_key(entry)] for entry in listed] == [9] + [1] * 9
    assert [len(group) for group in groups] == [2, 6]
    assert s3_proxy.counts.gets_by_key == requested


def test_reading_ahead_stops_at_its_limit(listed, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_AHEAD_BYTES", 2 * len(CONTENT))
    started = []

    def make_groups():
        for entry in listed:
            started.append(entry)
            yield [entry]

    groups = storage.fetch_ahead(make_groups())
    for num_read in range(1, 9):
        next(groups)
        assert len(started) == num_read + 1
    groups.close()
    assert len(list(storage.fetch_ahead([[Entry(entry.path)] for entry in listed]))) == 10


def test_only_the_key_that_keeps_failing_is_a_failed_row(listed, s3_proxy):
    s3_proxy.reset(Fault("internal_error", keys={get_key(listed[3])}))
    rows = storage.fetch(listed)
    assert [row.status for row in rows] == ["ok"] * 3 + ["read_error"] + ["ok"] * 6
    assert "InternalError" in rows[3].error
    assert s3_proxy.counts.gets_by_key[get_key(listed[3])] == retrying.MAX_ATTEMPTS


def test_a_throttled_key_is_retried_for_longer(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(retrying, "MAX_ATTEMPTS", 5)
    s3_proxy.reset(Fault("slow_down", keys={get_key(listed[3])}, first=20))
    assert [row.status for row in storage.fetch(listed)] == ["ok"] * 10
    monkeypatch.setattr(retrying, "NO_RESPONSE_TIMEOUT_S", 0.5)
    s3_proxy.reset(Fault("slow_down", keys={get_key(listed[3])}))
    assert [row.status for row in storage.fetch(listed)] == ["ok"] * 3 + ["read_error"] + ["ok"] * 6


@pytest.mark.parametrize("what", ["cut", "short", "reset"])
def test_a_body_that_breaks_off_is_read_again(what, listed, s3_proxy):
    s3_proxy.reset(Fault(what, kinds={"image"}, first=2, at_byte=1000))
    rows = storage.fetch(listed)
    assert [row.content for row in rows] == [CONTENT + bytes([i]) for i in range(10)]
    assert [row.retries for row in rows] == [2] * 10


@pytest.mark.parametrize("what", ["cut", "short", "reset"])
@pytest.mark.parametrize("known", [True, False])
def test_a_body_that_always_breaks_off_is_never_returned(what, known, listed, s3_proxy):
    s3_proxy.reset(Fault(what, keys={get_key(listed[0])}, kinds={"image"}, at_byte=1000))
    row = storage.fetch([listed[0] if known else Entry(listed[0].path)])[0]
    assert (row.status, row.content) == ("read_error", None)
    assert "the body" in row.error


def test_read_bytes_raises_a_run_error_if_a_later_attempt_may_succeed(listed, s3_proxy):
    s3_proxy.reset(Fault("cut", keys={get_key(listed[0])}, kinds={"image"}, at_byte=1000))
    with pytest.raises(RunError, match=r"cannot read s3://.*: the body broke off"):
        storage.read_bytes(listed[0].path)


def test_a_slow_body_is_abandoned_and_retried(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(objects, "BODY_TIMEOUT_S", 0.5)
    s3_proxy.reset(Fault("slow", kinds={"image"}, first=1, total=3))
    rows = storage.fetch(listed)
    assert [row.status for row in rows] == ["ok"] * 10
    assert sum(row.retries for row in rows) == 3


def test_a_store_that_is_down_stops_the_job_instead_of_failing_rows(listed, s3_proxy, monkeypatch):
    monkeypatch.setattr(retrying, "NO_RESPONSE_TIMEOUT_S", 0.5)
    s3_proxy.reset(Fault("slow_down"))
    with pytest.raises(RunError, match=r"the store does not answer: .*SlowDown.* check AWS_ENDPOINT_URL_S3"):
        storage.fetch(listed)


def test_refused_and_missing_keys_are_not_retried(listed, s3_proxy):
    s3_proxy.reset(Fault("access_denied", keys={get_key(listed[1])}), Fault("no_such_key", keys={get_key(listed[2])}))
    assert [row.status for row in storage.fetch(listed)][:4] == ["ok", "access_denied", "not_found", "ok"]
    assert s3_proxy.counts.by_method["GET"] == 10


def test_a_listing_that_breaks_off_is_retried_and_never_cut_short(listed, bucket, s3_proxy):
    s3_proxy.reset(Fault("short", kinds={"list"}, total=1), Fault("short", kinds={"list"}, total=1, at_byte=200))
    assert [entry.path for entry in Listing(f"s3://{bucket}/in")] == [entry.path for entry in listed]
    s3_proxy.reset(Fault("short", kinds={"list"}))
    with pytest.raises(RunError, match="cannot list"):
        list(Listing(f"s3://{bucket}/in"))


def test_the_client_outlives_the_instances_that_fsspec_caches(listed):
    assert [row.status for row in storage.fetch(listed[:1])] == ["ok"]
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    gc.collect()
    assert [row.status for row in storage.fetch(listed)] == ["ok"] * 10
    assert len(list(Listing(listed[0].path.rpartition("/")[0]))) == 10


def test_an_object_over_the_limit_is_not_read(listed, s3_proxy):
    for entry in (listed[0], Entry(listed[0].path)):
        row = storage.fetch([entry], 100)[0]
        assert (row.status, row.content) == ("too_large", None)
        assert row.error.startswith("2049 bytes, more than")


def test_credentials_that_cannot_be_fetched_stop_the_job(listed, monkeypatch):
    async def refused(*_, **__):
        response = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(response, "AssumeRoleWithWebIdentity")

    monkeypatch.setattr(reading, "get_object", refused)
    with pytest.raises(RunError, match="credentials are missing, wrong or expired"):
        storage.fetch(listed)


def test_expired_credentials_stop_all_reads(listed, s3_proxy):
    s3_proxy.reset(Fault("expired_token", after_images=5))
    with pytest.raises(RunError, match="ExpiredToken"):
        storage.fetch(listed)


def test_a_file_that_was_replaced_has_the_status_changed(listed, put, bucket):
    put("in/4.jpg", b"other")
    assert [row.status for row in storage.fetch(listed)][3:6] == ["ok", "changed", "ok"]


def test_an_image_takes_one_get_and_no_head(listed, s3_proxy):
    s3_proxy.reset()
    storage.fetch(listed)
    assert dict(s3_proxy.counts.by_method) == {"GET": 10}


# Writes with a condition


def test_create_needs_no_file_and_replace_needs_the_version_that_was_read(bucket):
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


def test_a_write_whose_response_was_lost_counts_as_written(bucket, s3_proxy):
    uri = f"s3://{bucket}/x"
    s3_proxy.reset(Fault("reset", methods={"PUT"}, total=1))
    assert storage.create_bytes(uri, b"one")
    version = storage.read_versioned(uri)[1]
    s3_proxy.reset(Fault("reset", methods={"PUT"}, total=1))
    assert storage.replace_bytes(uri, b"two", version)
    assert s3_proxy.counts.injected["reset"] == 1
    assert storage.read_bytes(uri) == b"two"


def test_a_store_without_conditional_writes_is_read_first(bucket, monkeypatch):
    uri, real = f"s3://{bucket}/x", objects.request

    async def request(operation, read=None, **parameters):
        if {"IfMatch", "IfNoneMatch"} & parameters.keys():
            response = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
            raise ClientError(response, operation)
        return await real(operation, read, **parameters)

    monkeypatch.setattr(objects, "request", request)
    assert storage.create_bytes(uri, b"one")
    assert not storage.create_bytes(uri, b"two")
    version = storage.read_versioned(uri)[1]
    assert storage.replace_bytes(uri, b"two", version)
    assert not storage.replace_bytes(uri, b"three", version)
    assert storage.read_bytes(uri) == b"two"


@pytest.mark.parametrize(("healthy_s", "delays"), [(1.0, [1.0] * 9), (0.0, [1.6, 3.2, *[5.0] * 7])])
def test_delays_grow_up_to_their_bound(healthy_s, delays, monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    attempts = iter(range(13))

    async def make_request():
        attempt = next(attempts)
        if attempt < 12:
            raise TimeoutError
        return attempt

    async def probe():
        return None

    monkeypatch.setattr(retrying, "MAX_DELAY_S", 5.0)
    monkeypatch.setattr(retrying, "MAX_DELAY_WHILE_HEALTHY_S", healthy_s)
    monkeypatch.setattr(retrying.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(retrying.asyncio, "sleep", sleep)
    assert asyncio.run(retrying.with_retries(make_request, probe)) == (12, 12)
    assert slept == [0.2, 0.4, 0.8, *delays]


def test_the_store_says_when_to_try_again(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    waits = iter(["9", "100000"])

    async def make_request():
        wait = next(waits, None)
        if wait is None:
            return "done"
        metadata = {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": wait}}
        raise ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": metadata}, "GetObject")

    monkeypatch.setattr(retrying.asyncio, "sleep", sleep)
    assert asyncio.run(retrying.with_retries(make_request, make_request)) == ("done", 2)
    assert slept == [9, retrying.MAX_RETRY_AFTER_S]


def test_each_retry_is_logged_with_its_traceback(listed, s3_proxy, caplog):
    caplog.set_level("DEBUG", logger="catsdogs")
    s3_proxy.reset(Fault("slow_down", keys={get_key(listed[0])}, first=2))
    storage.fetch(listed)
    records = [record for record in caplog.records if record.name == "catsdogs.storage.retrying"]
    assert [record.getMessage() for record in records] == [
        f"get_object {listed[0].path}: attempt {attempt} failed" for attempt in (1, 2)
    ]
    assert all(record.levelname == "DEBUG" and "SlowDown" in record.exc_text for record in records)


def test_the_error_of_a_failed_row_is_logged_with_its_traceback(listed, s3_proxy, caplog):
    caplog.set_level("DEBUG", logger="catsdogs")
    s3_proxy.reset(Fault("access_denied", keys={get_key(listed[1])}))
    storage.fetch(listed)
    (record,) = [record for record in caplog.records if record.name == "catsdogs.storage.reading"]
    assert record.getMessage() == f"cannot read {listed[1].path}"
    assert "AccessDenied" in record.exc_text
