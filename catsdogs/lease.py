"""One driver at a time: only the driver that has the lease of a folder writes there, and its workers.

`_lease.json` names the driver, which renews it every 10 s. A lease ends with its process if that ran on this machine,
else 60 s after its last renewal. A driver checks before each write that the lease is still its own, and so do the
workers of `train`, on any machine: they have the driver's claim. If a driver dies, Ray ends its workers; one that still
runs can write until another driver takes the lease. `score` creates many parts a second: for them it reads the lease
once a second (`LeaseWatch`).

A writer may lose the lease just after the check. Then it replaces no file that the next driver has written, because
writes are conditional on local disks and S3. A file that it writes before the next driver does is replaced by the next
driver's own. What `score` writes or removes without a condition does no harm: `verify` and the next command find a
record in `_stats` that is not that of its part, a missing `_SUCCESS`, and parts that are pending in spite of one.
"""

import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catsdogs import storage
from catsdogs.errors import CatsdogsError, InputError, NotRetryableError
from catsdogs.progress import Message, Progress

LEASE = "_lease.json"
LEASE_S = 60.0
RENEW_S = 10.0
POLL_S = 1.0
WATCH_S = 1.0
MAX_TRIES = 10  # to take a lease that other drivers take or return meanwhile
_active_tokens: set[str] = set()  # of the leases of this process
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseClaim:
    """A driver's claim to a folder. It can be pickled, so that workers check it.

    Attributes:
        run: what the driver does, for messages: "training run".
    """

    folder: str
    token: str
    run: str

    @property
    def uri(self) -> str:
        """URI of the lease."""
        return storage.join(self.folder, LEASE)

    def check(self) -> None:
        """Check that the lease is still the driver's own; NotRetryableError if it is gone or another driver has it."""
        if self.read_version() is None:
            raise NotRetryableError(f"{self.folder}: another {self.run} took over the lease; this one stops")

    def write(self, uri: str, content: bytes) -> None:
        """Write a file of the folder if the lease is still the driver's own.

        Raises:
            NotRetryableError: another driver has the lease, or another process wrote the file since it was checked.
        """
        version = storage.read_version(uri)  # first: a file that the next driver writes after the check has another
        self.check()
        if not storage.write_over(uri, content, version):
            raise NotRetryableError(f"{uri} was written by another process: make sure that no other run writes there")

    def read_version(self) -> str | None:
        """Read the version of the lease; None if it is gone or belongs to another driver."""
        found = storage.read_versioned(self.uri)
        return found[1] if found and _parse(found[0]).get("token") == self.token else None


class LeaseWatch:
    """Checks a lease from many threads, which together read it at most once in WATCH_S.

    This is enough before a file is created on condition that it does not exist. The condition keeps what is there,
    whichever driver has the lease: one that lost it within the last second may create a part, but replaces none. It
    is not enough before a file is replaced: if the next driver wrote it after the last check, its version is the one
    that this driver reads and replaces. `LeaseClaim.write` therefore checks between the two.
    """

    def __init__(self, claim: LeaseClaim) -> None:
        self._claim = claim
        self._checked_s = -math.inf
        self._error: CatsdogsError | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Check the lease as `LeaseClaim.check` does, unless that was done within WATCH_S or has failed."""
        with self._lock:  # the others wait for the result: after a pause, none writes before it is known
            now_s = time.monotonic()
            if self._error is None and now_s - self._checked_s >= WATCH_S:
                self._checked_s = now_s
                try:
                    self._claim.check()
                except CatsdogsError as error:
                    self._error = error
            if self._error is not None:
                raise self._error


class Lease:
    """The right to write to a folder, for the duration of a `with` block.

    Args:
        run: what the driver does, for messages: "training run".
        setting: the flag that selects the folder.
    """

    def __init__(self, folder: str, progress: Progress, run: str, setting: str) -> None:
        self.claim = LeaseClaim(folder, secrets.token_hex(8), run)
        self._setting = setting
        self._progress = progress
        self._driver: dict[str, Any] = {"pid": os.getpid(), "process_started": read_start_time(os.getpid())}
        self._driver |= {"token": self.claim.token} | _describe_machine()
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def __enter__(self) -> LeaseClaim:
        """Take the lease, once that of another machine has expired; InputError if a live driver has it."""
        if not any(self._take() for _ in range(MAX_TRIES)):
            raise InputError(
                f"{self.claim.uri}: expected to read, create or replace this file, but none of {MAX_TRIES} tries did; "
                "remove it if it is a link to nothing, or repeat the command if other commands write there"
            )
        _active_tokens.add(self.claim.token)
        self._renewal.start()
        return self.claim

    def __exit__(self, *_: object) -> None:
        """Return the lease if it is still ours."""
        self._ended.set()
        self._renewal.join()  # a renewal after the removal would write the file again
        _active_tokens.discard(self.claim.token)
        try:
            if self.claim.read_version():
                storage.remove(self.claim.uri)
        except CatsdogsError:
            logger.debug("the lease %s was not removed", self.claim.uri, exc_info=True)

    def _take(self) -> bool:
        found = storage.read_versioned(self.claim.uri)
        if found is None:
            return storage.create_bytes(self.claim.uri, self._content())
        self._wait_until_expired(*found)
        taken = storage.replace_bytes(self.claim.uri, self._content(), found[1])
        return taken and self.claim.read_version() is not None

    def _content(self) -> bytes:
        return json.dumps(self._driver | {"renewed": time.time()}, indent=2).encode()

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if version := self.claim.read_version():
                    storage.replace_bytes(self.claim.uri, self._content(), version)
            except CatsdogsError:  # the next renewal may succeed; `check` raises the error if it lasts
                logger.debug("the lease %s was not renewed", self.claim.uri, exc_info=True)

    def _wait_until_expired(self, content: bytes, version: str) -> None:
        """Return once the lease of another driver has ended; InputError if that driver is alive."""
        other = _parse(content)
        driver = f"process {other.get('pid', '?')} on {other.get('host', '?')}"
        folder, run = self.claim.folder, self.claim.run
        in_use = InputError(
            f"{self._setting} {folder}: another {run} ({driver}) is writing there; "
            f"wait for it, or give another {self._setting}"
        )
        if _describe_machine().items() <= other.items():
            if _is_alive(other):
                raise in_use
            return
        text = f"another {run} ({driver}) used {folder}: waiting up to {LEASE_S:.0f} s for its lease to end"
        self._progress(Message(text))
        end = time.monotonic() + LEASE_S
        while time.monotonic() < end and (found := storage.read_versioned(self.claim.uri)):
            if found[1] != version:
                raise in_use
            time.sleep(POLL_S)


def _parse(content: bytes) -> dict[str, Any]:
    """Parse a lease. A damaged one is empty, and expires as that of another machine does."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        record = None
    return record if isinstance(record, dict) else {}


def read_start_time(pid: int) -> str | None:
    """Read when a process of this machine started, in clock ticks since boot; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _describe_machine() -> dict[str, str]:
    """Identify this machine, its boot and its process namespace: within them a process id is unique."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid")}


def _is_alive(driver: dict[str, Any]) -> bool:
    """Return whether a driver of this machine runs and renews its lease."""
    pid, renewed = driver.get("pid"), driver.get("renewed")
    if not isinstance(pid, int) or not isinstance(renewed, int | float):
        return False  # damaged
    if pid == os.getpid() and str(driver.get("token")) not in _active_tokens:
        return False  # its lease could not be removed, or the response to our write was lost
    started = read_start_time(pid)
    return started is not None and started == driver.get("process_started") and time.time() - renewed < LEASE_S
