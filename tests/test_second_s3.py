"""Storage, a lease and scoring on SeaweedFS, a second S3 server: it checks signatures and keeps keys as a tree."""

import hashlib
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from boto3.s3.transfer import TransferConfig
from conftest import CLASSES, red_or_blue
from scoring import check_output, read_rows, run_scoring
from seaweedfs import BUCKET, CLOSED_BUCKET

from benchmarks.faults.proxy import Fault
from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError, NotRetryableError, RunError
from catsdogs.lease import Lease
from catsdogs.progress import silent
from catsdogs.storage import Entry, Listing, retrying, s3_ranges
from catsdogs.storage.s3_listing import list_pages

ODD_NAMES = [
    *("a b.jpg", " first.jpg", "a+b.jpg", "100%.jpg", "%20.jpg", "%2F.jpg", "what?.jpg", "v?versionId=1.jpg", "#1.jpg"),
    *("é.jpg", "e\u0301.jpg", "żółć 猫 🐈.jpg", "\uffff.jpg", "\U0010ffff.jpg", "line\nbreak.jpg", "tab\t.jpg"),
    *("\x01.jpg", "\x7f.jpg", "'\"<&>.jpg", "*[a];=:@,$!().jpg", "~.jpg", "-.jpg", "f/g/h.jpg"),
]
LIST_ALL = """
from catsdogs import storage
from catsdogs.errors import CatsdogsError
for call in (
    lambda: storage.fetch([storage.Entry("s3://seaweed/x.jpg")]),
    lambda: list(storage.Listing("s3://seaweed/p")),
    lambda: storage.list_names("s3://seaweed/p"),
    lambda: storage.write_bytes("s3://seaweed/x", b""),
):
    try:
        print(call())
    except CatsdogsError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def folder(seaweedfs, s3_proxy, monkeypatch):
    """A new prefix in the bucket of the second server."""
    monkeypatch.setattr(retrying, "MAX_DELAY_S", 0.02)
    return f"s3://{BUCKET}/{time.monotonic_ns()}"


def fill(seaweedfs, folder, names):
    """Write small objects, eight at once."""
    prefix = folder.split("/", 3)[3]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: seaweedfs.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"x"), names))


def list_relative(folder, **settings):
    return [entry.path.removeprefix(f"{folder}/") for entry in Listing(folder, **settings)]


# Listing


def test_odd_keys_are_written_listed_and_read(folder):
    for name in ODD_NAMES:
        assert storage.create_bytes(f"{folder}/{name}", name.encode())
    entries = list(Listing(folder))
    ordered = sorted(ODD_NAMES, key=str.encode)
    assert [entry.path for entry in entries] == [f"{folder}/{name}" for name in ordered]
    assert [entry.version for entry in entries] == [hashlib.md5(name.encode()).hexdigest() for name in ordered]
    fetched = storage.fetch(entries)
    assert [(file.status, file.content) for file in fetched] == [("ok", name.encode()) for name in ordered]
    names = {name.partition("/")[0] for name in ODD_NAMES}
    assert storage.list_names(folder) == sorted(names)
    for name in ODD_NAMES:
        storage.remove(f"{folder}/{name}")
    assert list(Listing(folder)) == []


def test_markers_of_folders_are_no_images_and_double_slashes_are_single_ones(folder):
    for name in ("a/", "a/b.jpg", "a//c.jpg", "a//d/"):
        storage.write_bytes(f"{folder}/{name}", b"x")
    assert list_relative(folder) == ["a/b.jpg", "a/c.jpg"]
    read = storage.fetch([Entry(f"{folder}/a//c.jpg"), Entry(f"{folder}/a/c.jpg"), Entry(f"{folder}/./e.jpg")])
    assert [file.status for file in read] == ["ok", "ok", "read_error"]


def test_a_folder_and_a_name_that_continues_its_own_are_listed_one_by_one(folder):
    for name in ("cats/a.jpg", "cats-old/b.jpg"):
        storage.write_bytes(f"{folder}/{name}", b"x")
    with pytest.raises(RunError, match=r"lists '.*/cats-old/b.jpg' after '.*/cats/a.jpg', not in the order of their b"):
        list(Listing(folder))
    assert list_relative(f"{folder}/cats") == ["a.jpg"]
    assert list_relative(f"{folder}/cats-old") == ["b.jpg"]


def test_a_page_that_ends_in_a_character_that_xml_lacks_does_not_end_a_listing(folder):
    for name in ("\x011.jpg", "\x012.jpg"):
        storage.write_bytes(f"{folder}/{name}", b"x")
    assert list_relative(folder) == ["\x011.jpg", "\x012.jpg"]
    with pytest.raises(RunError, match="sends a continuation token that lost a character of a key"):
        list(list_pages(BUCKET, folder.split("/", 3)[3], MaxKeys=1))


def test_ranges_of_a_large_prefix_lose_no_key(seaweedfs, folder, s3_proxy, monkeypatch):
    """The first page ends in the folder 1. A range that begins after `2` would skip the folder 2."""
    names = [f"{max(0, i // 300 - 2)}/{i % 7}/{i}.jpg" for i in range(1500)]
    fill(seaweedfs, folder, names)
    expected = sorted(names)
    monkeypatch.setattr(s3_ranges, "FIRST_PAGES", 1)
    s3_proxy.reset(Fault("slow_down", probability=0.2))
    assert list_relative(folder) == expected
    num_requests = s3_proxy.counts.by_kind["list"] - s3_proxy.counts.injected["slow_down"]
    assert num_requests > 2  # more than one range: one would be two pages
    assert list_relative(folder, start_after=f"{folder}/{expected[1200]}") == expected[1201:]


# Reading


def test_each_error_has_its_status(seaweedfs, folder):
    seaweedfs.put_object(Bucket=CLOSED_BUCKET, Key="a.jpg", Body=b"x")
    storage.write_bytes(f"{folder}/old.jpg", b"old")
    listed = next(iter(Listing(folder)))
    storage.write_bytes(listed.path, b"new")
    others = [f"{folder}/absent.jpg", f"{folder}/old.jpg/inside.jpg", f"s3://{CLOSED_BUCKET}/a.jpg"]
    entries = [listed, *map(Entry, others)]
    statuses = ["changed", "not_found", "not_found", "access_denied"]
    assert [file.status for file in storage.fetch(entries)] == statuses
    with pytest.raises(InputError, match=r"AccessDenied.* check the bucket, its policy and the endpoint"):
        list(Listing(f"s3://{CLOSED_BUCKET}"))
    with pytest.raises(NotRetryableError, match="AccessDenied"):
        storage.write_bytes(f"s3://{CLOSED_BUCKET}/b.jpg", b"x")


@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_wrong_credentials_are_named(folder, variable, code):
    environment = os.environ | {variable: "other"}
    command = [sys.executable, "-c", LIST_ALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    message = f"RunError the S3 credentials are missing, wrong or expired ({code})"
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [message] * 4


def test_large_objects_are_written_at_once_and_read_whatever_their_etag(seaweedfs, folder, tmp_path):
    content = random.Random(0).randbytes(11 << 20)
    (tmp_path / "a.jpg").write_bytes(content)
    config = TransferConfig(multipart_threshold=1, multipart_chunksize=5 << 20)
    seaweedfs.upload_file(str(tmp_path / "a.jpg"), BUCKET, f"{folder.split('/', 3)[3]}/a.jpg", Config=config)
    storage.write_bytes(f"{folder}/b.jpg", content)
    entries = list(Listing(folder))
    assert [entry.version.partition("-")[2] for entry in entries] == ["3", ""]
    for files in (storage.fetch(entries), storage.fetch([Entry(entry.path) for entry in entries])):
        assert [file.content == content for file in files] == [True, True]


# Writing with a condition


def test_one_of_two_writers_creates_or_replaces_a_file(folder):
    uri = f"{folder}/x"
    with ThreadPoolExecutor(2) as threads:
        created = list(threads.map(lambda i: storage.create_bytes(uri, bytes([i])), range(2)))
        content, version = storage.read_versioned(uri)
        assert (sum(created), content) == (1, bytes([created.index(True)]))
        replaced = list(threads.map(lambda i: storage.replace_bytes(uri, bytes([8, i]), version), range(2)))
    assert (sum(replaced), storage.read_bytes(uri)) == (1, bytes([8, replaced.index(True)]))
    assert not storage.replace_bytes(f"{folder}/absent", b"x", version)
    assert storage.read_versioned(f"{folder}/absent") is None


def test_a_write_whose_response_was_lost_counts_as_written(folder, s3_proxy):
    s3_proxy.reset(Fault("reset", methods={"PUT"}, total=1))
    assert storage.create_bytes(f"{folder}/x", b"one")
    version = storage.read_version(f"{folder}/x")
    s3_proxy.reset(Fault("reset", methods={"PUT"}, total=1))
    assert storage.write_over(f"{folder}/x", b"two", version)
    assert (s3_proxy.counts.injected["reset"], storage.read_bytes(f"{folder}/x")) == (1, b"two")


def test_a_lease_is_refused_to_a_second_driver_and_its_loss_stops_the_first(folder):
    driver = ("training run", "--name")
    with Lease(folder, silent, *driver) as lease:
        lease.write(f"{folder}/a", b"1")
        lease.write(f"{folder}/a", b"2")
        with (
            pytest.raises(InputError, match=r"another training run .* is writing there"),
            Lease(folder, silent, *driver),
        ):
            pass
        storage.write_bytes(lease.uri, b"{}")  # a damaged one of another driver
        with pytest.raises(NotRetryableError, match="another training run took over the lease"):
            lease.write(f"{folder}/a", b"3")
    assert storage.read_bytes(f"{folder}/a") == b"2"


# Scoring


def test_an_output_resumes_and_grows(folder, s3_proxy):
    source, output = f"{folder}/in", f"{folder}/out"
    for name in "abcdefg":
        storage.write_bytes(f"{source}/{name}.jpg", name.encode())
    s3_proxy.reset(Fault("expired_token", after_images=4))
    with pytest.raises(RunError, match="credentials are missing, wrong or expired"):
        run_scoring(source, output)
    s3_proxy.reset(Fault("slow_down", probability=0.2))
    assert run_scoring(source, output)[0]["rows"] == 7
    assert run_scoring(source, output)[1] == []
    storage.write_bytes(f"{source}/e.jpg", b"changed")
    storage.write_bytes(f"{source}/h.jpg", b"new")
    assert run_scoring(source, output)[1] == ["e.jpg", "h.jpg"]
    storage.remove(f"{output}/part-00000.parquet")
    assert run_scoring(source, output)[1] == ["a.jpg", "b.jpg", "c.jpg"]
    check_output(output, 8)


def test_score_loses_no_row_while_the_store_is_throttled(ray_cluster, red_blue_checkpoint, folder, s3_proxy):
    from catsdogs.score import score  # it imports Ray, which reads the environment that conftest sets

    expected = {f"{folder}/in/{CLASSES[i % 2]}/{i:02}.jpg": CLASSES[i % 2] for i in range(20)}
    for i, (path, label) in enumerate(expected.items()):
        storage.write_bytes(path, red_or_blue(label, i))
    settings = {"input": f"{folder}/in", "output": f"{folder}/out", "checkpoint": str(red_blue_checkpoint)}
    s3_proxy.reset(Fault("slow_down", probability=0.1))
    assert score(ScoreConfig(**settings, shard_size=5, batch_size=4, num_actors=1))["by_status"] == {"ok": 20}
    assert s3_proxy.counts.injected["slow_down"] > 0
    assert {path: row["label"] for path, row in read_rows(f"{folder}/out").items()} == expected
    check_output(f"{folder}/out", 20)
