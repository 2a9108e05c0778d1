"""Bytes -> files that appear whole or not at all, where wanted only over nothing or over what was read.

Local: a temporary name, fsync, then a link or a rename, and fsync of the folder. S3: one PUT, with a condition.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator

from catsdogs.errors import RunError
from catsdogs.storage.objects import delete_object, put_object
from catsdogs.storage.reading import local_version, read_versioned
from catsdogs.storage.s3 import STORE_ERRORS, check_credentials, split_s3
from catsdogs.storage.uris import exists, filesystem, fs_path, is_local, local_path

TEMPORARY = re.compile(rb"\..{1,40}\.[0-9a-f]{16}", re.DOTALL)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_bytes(uri: str, content: bytes) -> None:
    """Write or replace a file whole.

    Raises:
        RunError: it cannot be written, and nothing is left of it; or the credentials are missing or expired.
    """
    with _explained(uri):
        if is_local(uri):
            with _finished(local_path(uri), content) as temporary:
                os.replace(temporary, local_path(uri))
        elif uri.startswith("s3://"):
            put_object(*split_s3(uri), content)
        else:
            filesystem(uri).pipe_file(fs_path(uri), content)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write a file whole where there is none; False where something is there already.

    Raises:
        RunError: as write_bytes.
    """
    with _explained(uri):
        if is_local(uri):
            return not os.path.lexists(local_path(uri)) and _create_local(local_path(uri), content)
        if uri.startswith("s3://"):
            return put_object(*split_s3(uri), content, only_new=True)
        if exists(uri):
            return False
        filesystem(uri).pipe_file(fs_path(uri), content)
    return True


def replace_bytes(uri: str, content: bytes, version: str) -> bool:
    """Replace a file whole if it is still the version that was read; False otherwise.

    Raises:
        RunError: as write_bytes.
    """
    with _explained(uri):
        if is_local(uri):
            return _replace_local(local_path(uri), content, version)
        if uri.startswith("s3://"):
            return put_object(*split_s3(uri), content, only_over=version)
        found = read_versioned(uri)
        if found is None or found[1] != version:
            return False
        filesystem(uri).pipe_file(fs_path(uri), content)
    return True


def remove(uri: str) -> None:
    """Remove one file; absent is fine.

    Raises:
        RunError: as write_bytes.
    """
    with _explained(uri), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            os.unlink(local_path(uri))
        elif uri.startswith("s3://"):
            delete_object(*split_s3(uri))
        else:
            filesystem(uri).rm_file(fs_path(uri))


def remove_temporaries(uri: str) -> None:
    """Remove what a killed writer left in a local folder; other stores keep nothing unfinished in sight."""
    if not is_local(uri):
        return
    folder = local_path(uri)
    with _explained(uri), contextlib.suppress(FileNotFoundError):
        for name in filter(TEMPORARY.fullmatch, os.listdir(folder)):
            os.unlink(os.path.join(folder, name))


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except STORE_ERRORS as error:
        check_credentials(error)
        raise RunError(f"cannot write {uri}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def _finished(path: bytes, content: bytes) -> Iterator[bytes]:
    """Finish a file beside its place, to be given its name; durable afterwards, and nothing else is left."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, b"." + name[:40] + b"." + secrets.token_hex(8).encode())
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(folder)


def _create_local(path: bytes, content: bytes) -> bool:
    with _finished(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
    return True


def _replace_local(path: bytes, content: bytes, version: str) -> bool:
    try:
        if local_version(os.stat(path)) != version:
            return False
    except FileNotFoundError:
        return False
    with _finished(path, content) as temporary:
        os.replace(temporary, path)
    return True


def _sync_folder(folder: bytes) -> None:
    """Make the names in a folder durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
