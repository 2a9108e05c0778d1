"""`make bench-scale`: its server keeps the conditions of S3, and its measurements run, at a small size."""

import re

import boto3
import pytest
from botocore.exceptions import ClientError

from benchmarks.scale import audited_set, commits, comparing, listing, memory, planning
from benchmarks.scale.store import LateStore


@pytest.fixture
def client():
    with LateStore(0.0) as store:
        opened = boto3.client("s3", endpoint_url=store.environment["AWS_ENDPOINT_URL_S3"])
        yield opened
        opened.close()


def get_status(call, **arguments):
    with pytest.raises(ClientError) as caught:
        call(Bucket="b", **arguments)
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


def test_the_late_store_keeps_conditions_and_lists_in_pages(client):
    etag = client.put_object(Bucket="b", Key="x/1", Body=b"one", IfNoneMatch="*")["ETag"]
    assert get_status(client.put_object, Key="x/1", Body=b"two", IfNoneMatch="*") == 412
    client.put_object(Bucket="b", Key="x/1", Body=b"three", IfMatch=etag)
    assert get_status(client.put_object, Key="x/1", Body=b"four", IfMatch=etag) == 412
    assert client.get_object(Bucket="b", Key="x/1")["Body"].read() == b"three"
    for i in range(1001):
        client.put_object(Bucket="b", Key=f"many/{i:04}", Body=b"x")
    pages = list(client.get_paginator("list_objects_v2").paginate(Bucket="b", Prefix="many/", Delimiter="/"))
    assert [len(page["Contents"]) for page in pages] == [1000, 1]
    page = client.list_objects_v2(Bucket="b", Prefix="", Delimiter="/")
    assert [item["Prefix"] for item in page["CommonPrefixes"]] == ["many/", "x/"]
    client.delete_object(Bucket="b", Key="x/1")
    assert get_status(client.get_object, Key="x/1") == get_status(client.head_object, Key="x/1") == 404


def test_commits_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "NUM_SHARDS", 30)
    ((line, _),) = commits.check_commits(tmp_path)
    assert re.match(r"Parts committed on an S3 server with 50 ms added to each request: \d+/s", line)


def test_listing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "NUM_KEYS", 20_001)
    ((line, _),) = listing.check_listing(tmp_path)  # checks the keys, too
    assert re.match(r"Keys listed on an S3 server with 50 ms added to each page: [\d,]+/s in ranges, [\d,]+/s", line)


def test_a_comparison_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "NUM_ROWS", 20_001)
    ((line, reached),) = comparing.check_comparison(tmp_path)
    assert reached
    assert re.match(r"Memory of compare with two tables of 20,001 rows, all of them changed: [\d.]+ GiB", line)


@pytest.mark.slow
def test_planning_and_memory_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(audited_set, "NUM_FILES", 30)
    monkeypatch.setattr(planning, "SMALL", 10)
    monkeypatch.setattr(planning, "LARGE", 20)
    monkeypatch.setattr(memory, "NUM_FILES", 300)
    assert re.match(r"Planning, .* [\d.]+ ms / ", next(line for line, _ in planning.check_planning(tmp_path)))
    assert re.match(r"Memory .* [\d.]+ MiB / ", next(line for line, _ in memory.check_memory(tmp_path)))
    ((line, _),) = audited_set.check_audited_set(tmp_path)
    assert re.match(r"Memory of the driver of `audit` at 300 / 30 files: \d+ MiB / \d+ MiB, of which without", line)
