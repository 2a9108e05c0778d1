"""Bytes -> files that appear whole or not at all."""

import contextlib
import os
import secrets

from catsdogs.errors import RunError
from catsdogs.storage.s3 import STORE_ERRORS, check_credentials
from catsdogs.storage.uris import filesystem, fs_path, is_local, local_path


def write_bytes(uri: str, content: bytes) -> None:
    """Write or replace a file whole: a rename of a finished file, or one upload.

    Raises:
        RunError: it cannot be written, and nothing is left of it; or the credentials are missing or expired.
    """
    try:
        if is_local(uri):
            _write_local(local_path(uri), content)
        else:
            filesystem(uri).pipe_file(fs_path(uri), content)
    except STORE_ERRORS as error:
        check_credentials(error)
        raise RunError(f"cannot write {uri}: {getattr(error, 'strerror', None) or error}") from error


def _write_local(path: bytes, content: bytes) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, b"." + name[:40] + b"." + secrets.token_hex(8).encode())
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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
