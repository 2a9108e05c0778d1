"""Bytes -> files that appear whole or not at all."""

import contextlib
import os
import tempfile

from catsdogs.errors import RunError
from catsdogs.storage.uris import filesystem, fs_path, is_local, local_path


def write_bytes(uri: str, content: bytes) -> None:
    """Write or replace a file whole: a rename of a finished file, or one upload.

    Raises:
        RunError: it cannot be written; nothing is left of it.
    """
    try:
        if is_local(uri):
            _write_local(local_path(uri), content)
        else:
            filesystem(uri).pipe_file(fs_path(uri), content)
    except OSError as error:
        raise RunError(f"cannot write {uri}: {error.strerror or error}") from error


def _write_local(path: bytes, content: bytes) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=b"." + name[:40] + b".", dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def make_folder(uri: str) -> None:
    """Make a local folder with its parents; object stores need none.

    Raises:
        RunError: it cannot be made.
    """
    if not is_local(uri):
        return
    try:
        os.makedirs(local_path(uri), exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {uri}: {error.strerror}") from error


def remove(uri: str) -> None:
    """Remove one file; absent is fine."""
    with contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            os.unlink(local_path(uri))
        else:
            filesystem(uri).rm_file(fs_path(uri))
