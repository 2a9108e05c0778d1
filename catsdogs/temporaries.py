"""Temporary files and folders: each live process locks its own, so those of killed processes can be removed.

Where the file system has no locks, none is removed.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

MIN_AGE_S = 60.0  # of a folder that is removed: a process may have made a newer one and not locked it yet


def lock(descriptor: int) -> bool:
    """Lock a file or folder until its descriptor is closed; return False if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_if_stale(path: bytes) -> None:
    """Remove a temporary file if no process has it locked."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)  # on NFS, a lock needs O_RDWR
    except OSError:  # removed just now, or of another user
        return
    try:
        if lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """Make a folder that is removed at the end; first remove those that killed processes of this user left."""
    for path in parent.glob(f"{prefix}*"):
        _remove_folder_if_stale(path)
    with TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            lock(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)


def _remove_folder_if_stale(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        found = os.fstat(descriptor)
        is_old = time.time() - found.st_mtime >= MIN_AGE_S
        if is_old and found.st_uid == os.getuid() and lock(descriptor):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
