"""The lease of a folder: the claim of a driver, which workers check, and conditional writes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from catsdogs import lease as lease_module
from catsdogs import storage
from catsdogs.errors import InputError, NotRetryableError
from catsdogs.lease import Lease, LeaseClaim, LeaseWatch
from catsdogs.progress import silent

TRAINING = ("training run", "--name")


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    """A folder on the local disk and one in a bucket."""
    return str(tmp_path / "run") if request.param == "local" else f"s3://{request.getfixturevalue('bucket')}/run"


def test_a_claim_can_be_sent_to_another_process_and_ends_with_its_lease(folder):
    with Lease(folder, silent, *TRAINING) as lease:
        claim = pickle.loads(pickle.dumps(lease))
        claim.write(f"{folder}/a", b"1")
        claim.write(f"{folder}/a", b"2")
        assert storage.read_bytes(f"{folder}/a") == b"2"
    with pytest.raises(NotRetryableError, match="another training run took over the lease"):
        claim.write(f"{folder}/a", b"3")
    assert storage.list_names(folder) == ["a"]
    assert storage.read_bytes(f"{folder}/a") == b"2"


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_writer_that_loses_its_lease_after_the_check_replaces_no_file_of_the_next(folder, before, monkeypatch):
    if before is not None:
        storage.write_bytes(f"{folder}/a", before)
    with Lease(folder, silent, *TRAINING) as lease:
        monkeypatch.setattr(LeaseClaim, "check", lambda _: storage.write_bytes(f"{folder}/a", b"of the next driver"))
        with pytest.raises(NotRetryableError, match="a was written by another process"):
            lease.write(f"{folder}/a", b"late")
    assert storage.read_bytes(f"{folder}/a") == b"of the next driver"


def test_threads_that_watch_a_lease_read_it_once_in_a_while(folder, monkeypatch):
    reads = []
    read_versioned = storage.read_versioned
    with Lease(folder, silent, *TRAINING) as lease:
        monkeypatch.setattr(storage, "read_versioned", lambda uri: reads.append(uri) or read_versioned(uri))
        monkeypatch.setattr(lease_module, "WATCH_S", 3600.0)
        watch = LeaseWatch(lease)
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda _: watch.check(), range(100))) == [None] * 100
        assert reads == [lease.uri]
        storage.remove(lease.uri)
        watch.check()
        monkeypatch.setattr(lease_module, "WATCH_S", 0.0)
        with ThreadPoolExecutor(8) as threads:
            checks = [threads.submit(watch.check) for _ in range(8)]
        assert [type(check.exception()) for check in checks] == [NotRetryableError] * 8


def test_the_refusal_names_the_folder_the_process_and_what_to_do(tmp_path):
    with (
        Lease(str(tmp_path), silent, *TRAINING),
        pytest.raises(InputError, match=rf"--name {tmp_path}: another training run \(process .*give another --name"),
        Lease(str(tmp_path), silent, *TRAINING),
    ):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        {"pid": None},
        {"pid": 2**30, "process_started": None},
        {"process_started": []},
        {"renewed": "yesterday"},
        {"token": 1},
    ],
)
def test_a_damaged_lease_of_a_dead_driver_is_taken(tmp_path, damage):
    with Lease(str(tmp_path), silent, *TRAINING):
        record = json.loads((tmp_path / "_lease.json").read_text())
    dead = record | {"process_started": "1"} | damage
    (tmp_path / "_lease.json").write_text(json.dumps(dead))
    with Lease(str(tmp_path), silent, *TRAINING):
        assert json.loads((tmp_path / "_lease.json").read_text())["token"] != record["token"]
    assert not (tmp_path / "_lease.json").exists()


def test_a_lease_that_is_nested_too_deeply_expires(tmp_path, monkeypatch):
    monkeypatch.setattr("catsdogs.lease.LEASE_S", 0.0)
    (tmp_path / "_lease.json").write_bytes(b"[" * 200_000)
    with Lease(str(tmp_path), silent, *TRAINING) as lease:
        lease.check()


def test_a_lease_that_is_a_link_to_nothing_is_an_error(tmp_path):
    """It cannot be read, but it exists: without a limit, the command would try forever."""
    (tmp_path / "_lease.json").symlink_to(tmp_path / "absent")
    with (
        pytest.raises(InputError, match=r"_lease.json: expected to read, create or replace this file, .*; remove it"),
        Lease(str(tmp_path), silent, *TRAINING),
    ):
        pass
