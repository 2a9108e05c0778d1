"""The token and the folder of a Ray that this process starts.

The token is in the environment of Ray's processes only. Only this user can enter the folder: it has Ray's sockets, logs
and spilled objects, and is removed at the end. The process locks a file in it until it ends: a folder whose file is not
locked is that of a killed process, and the next one in the same place removes it.
"""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from catsdogs import temporaries
from catsdogs.errors import RunError
from catsdogs.logs import is_verbose

logger = logging.getLogger(__name__)

# The path of a socket has at most 107 bytes (man 7 unix).
LONGEST_SOCKET = "/ray-12345678/ray/session_2026-01-31_00-00-00_000000_4194304/sockets/plasma_store"
MAX_PARENT_BYTES = 107 - len(LONGEST_SOCKET)
END_S = 5.0  # in which a killed process ends
PREFIX, LOCK = "ray-", "driver.lock"

_token = secrets.token_hex(32)  # one for all: a process reads its token once
_folders: dict[Path, int] = {}  # with the descriptor of the locked file


@contextlib.contextmanager
def session_environment(with_token: bool) -> Iterator[None]:
    """Make a new folder, and set the environment variables that Ray's processes inherit.

    Args:
        with_token: use this module's token, not the user's.

    Raises:
        RunError: there is no place for the folder.
    """
    variables = {"RAY_TMPDIR": str(_make_folder())}
    variables |= {"RAY_AUTH_TOKEN": _token} if with_token else {}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


def _make_folder() -> Path:
    chosen = os.environ.get("RAY_TMPDIR")
    reasons = []
    for parent in [chosen] if chosen else [os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp"]:
        try:
            folder = _make_folder_in(parent)
        except OSError as error:
            reasons.append(f"{parent:.80}: {error.strerror}")
        else:
            _remove_abandoned(folder.parent)
            return folder
    raise RunError(
        f"no folder for Ray's sockets ({'; '.join(dict.fromkeys(reasons))}): set RAY_TMPDIR to a writable folder whose "
        f"path has at most {MAX_PARENT_BYTES} bytes"
    )


def _make_folder_in(parent: str) -> Path:
    path = os.path.abspath(parent)
    if not path.isascii():  # Ray 2.60 cannot start there
        raise OSError(errno.EINVAL, "not ASCII")
    if len(path) > MAX_PARENT_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path))
    try:
        _folders[folder] = _lock(folder)
    except BaseException:  # for example a full disk, or Ctrl-C: without its lock, no later command removes the folder
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _lock(folder: Path) -> int:
    """Lock a file in the folder until this process ends; return its descriptor."""
    unlocked = folder / f"{LOCK}.new"
    descriptor = os.open(unlocked, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if temporaries.lock(descriptor):
            unlocked.rename(folder / LOCK)  # locked before other processes can find it
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user's killed processes, and end what is left of their Ray."""
    for lock_file in parent.glob(f"{PREFIX}*/{LOCK}"):
        try:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # of another user, or removed just now
            continue
        try:
            if temporaries.lock(descriptor) and os.fstat(descriptor).st_uid == os.getuid():
                _end_processes(lock_file.parent)
                shutil.rmtree(lock_file.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


def remove_folders() -> None:
    """End what is left of Ray, and remove the folders. If verbose, keep them for their logs."""
    while _folders:
        folder, descriptor = _folders.popitem()
        _end_processes(folder)
        if is_verbose():
            (folder / LOCK).unlink(missing_ok=True)  # no later command removes the folder
            logger.debug("Ray's logs are in %s/ray/session_latest/logs", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _end_processes(folder: Path) -> None:
    """End the workers that were still starting when Ray ended: they would create the folder again."""
    processes = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("RAY_TMPDIR") == str(folder)
    ]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_S)
