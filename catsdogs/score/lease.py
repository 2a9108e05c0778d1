"""One driver at a time: who holds an output may commit there.

`_lease.json` names the holder, which renews it every 10 s; after 60 s without it has run out. A driver that lost its
lease finds out before its next commit. What slips between that look and the commit is stopped by the commit itself:
a part is only created where none is, or replaces the version that was read.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Message, Progress

LEASE = "_lease.json"
LEASE_S = 60.0
RENEW_S = 10.0
POLL_S = 1.0
SETTLE_S = 0.2  # two who take a dead driver's lease at once see each other
_held: set[str] = set()  # tokens of the leases of this process


def clock_s() -> float:
    """Read a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started(pid: int) -> str | None:
    """Tell when a process of this machine started, in clock ticks since boot; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _host() -> dict[str, str]:
    """Name this machine, and this start of it, so that a process id means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid")}


class Lease:
    """The right to commit to an output, held while the context lasts."""

    def __init__(self, output: str, progress: Progress) -> None:
        self._output = output
        self._uri = storage.join(output, LEASE)
        self._progress = progress
        self._mine: dict[str, Any] = _host() | {"pid": os.getpid(), "process_started": started(os.getpid())}
        self._mine["token"] = secrets.token_hex(8)
        self._version = ""
        self._renewed = 0.0
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Take the lease; wait for one of another machine to run out.

        Raises:
            InputError: another scoring holds it.
        """
        while not self._take():
            pass
        _held.add(self._mine["token"])
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease back where it is still ours."""
        self._ended.set()
        _held.discard(self._mine["token"])
        with self._lock, contextlib.suppress(RunError, InputError):
            found = storage.read_versioned(self._uri)
            if self._lost is None and self._is_mine(found):
                storage.remove(self._uri)

    def check(self) -> None:
        """Make sure that this driver may commit: read whose lease it is, and renew one that has run out.

        Raises:
            RunError: another driver has taken over.
        """
        with self._lock:
            if self._lost is None:
                self._look()
            if self._lost is None and clock_s() - self._renewed > LEASE_S:
                self._renew()
        if self._lost is not None:
            raise RunError(f"{self._output}: {self._lost}; this scoring stops")

    def _take(self) -> bool:
        """Try once; whether the lease is ours now."""
        found = storage.read_versioned(self._uri)
        if found is None:
            taken = storage.create_bytes(self._uri, self._content())
        else:
            self._wait_until_expired(*found)
            taken = storage.replace_bytes(self._uri, self._content(), found[1])
            time.sleep(SETTLE_S)
        if not taken:
            return False
        current = storage.read_versioned(self._uri)
        if current is None or not self._is_mine(current):
            return False
        self._version, self._renewed = current[1], clock_s()
        return True

    def _is_mine(self, found: tuple[bytes, str] | None) -> bool:
        return found is not None and _record(found[0]).get("token") == self._mine["token"]

    def _content(self) -> bytes:
        return json.dumps(self._mine | {"renewed": time.time()}, indent=2).encode()

    def _wait_until_expired(self, content: bytes, version: str) -> None:
        """Return as soon as a lease binds nobody.

        Raises:
            InputError: its holder is alive.
        """
        holder = _record(content)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        if all(holder.get(name) == value for name, value in _host().items()):
            if started(int(holder["pid"])) != holder.get("process_started"):
                return
            if holder["pid"] == os.getpid() and holder.get("token") not in _held:  # could not be given back
                return
            if time.time() - float(holder.get("renewed", 0)) < LEASE_S:
                raise self._check_fatal(who)
            return
        self._progress(
            Message(f"another scoring ({who}) held {self._output}: waiting up to {LEASE_S:.0f} s until its lease ends")
        )
        end = clock_s() + LEASE_S
        while clock_s() < end:
            time.sleep(POLL_S)
            found = storage.read_versioned(self._uri)
            if found is None:
                return
            if found[1] != version:
                raise self._check_fatal(who)

    def _check_fatal(self, who: str) -> InputError:
        return InputError(
            f"--output {self._output}: another scoring ({who}) is writing there; wait for it, or give another --output"
        )

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            with self._lock, contextlib.suppress(Exception):  # the next check tries again, and says why
                if self._lost is None and not self._ended.is_set():
                    self._renew()

    def _renew(self) -> None:
        written = storage.replace_bytes(self._uri, self._content(), self._version)
        self._look()
        if written and self._lost is None:
            self._renewed = clock_s()

    def _look(self) -> None:
        """Find out whose lease it is."""
        found = storage.read_versioned(self._uri)
        if found is None or not self._is_mine(found):
            self._lost = "the lease is gone" if found is None else "another scoring has taken over"
        else:  # after a renewal of ours whose answer got lost, not the version that we knew
            self._version = found[1]


def _record(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
