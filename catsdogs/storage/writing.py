"""Atomic writes, also conditional ones: only if the file does not exist, or only over the version that was read.

Local: write a hidden temporary file, fsync it, link or rename it, and fsync the folder. S3: one PUT, perhaps with a
condition. Other stores: check, then write; two writers may overwrite each other.

Every function raises RunError if the file cannot be written; then nothing partial is left. It is a NotRetryableError if
the disk is full or the permission is missing: another attempt would fail in the same way.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping

from catsdogs.errors import NotRetryableError, RunError
from catsdogs.storage.objects import put_object, read_etag, request_sync
from catsdogs.storage.other_stores import call
from catsdogs.storage.reading import local_write_version, read_versioned
from catsdogs.storage.s3 import REFUSED, STORE_ERRORS, check_credentials, read_error_code, split_s3, to_store_error
from catsdogs.storage.uris import exists, is_local, join, list_names, local_path
from catsdogs.temporaries import lock, remove_if_stale

TEMPORARY = re.compile(rb"\..{1,40}\.[0-9a-f]{16}\.catsdogs", re.DOTALL)
# A full disk or quota, a read-only file system, no permission.
NOT_RETRYABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
FULL_STORE = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}  # codes of Ceph and MinIO
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

logger = logging.getLogger(__name__)


def write_bytes(uri: str, content: bytes) -> None:
    """Write or replace a file atomically."""
    with _convert_errors(uri):
        if is_local(uri):
            with _written(local_path(uri), content) as temporary:
                os.replace(temporary, local_path(uri))
        elif uri.startswith("s3://"):
            put_object(*split_s3(uri), content)
        else:
            call(uri, "pipe_file", content)


def write_files(folder: str, files: Mapping[str, bytes], obsolete: Iterable[str] = ()) -> None:
    """Write the files of a result, by name, each atomically.

    The last one is removed first and written last: if the process is killed, it is not beside files of another result.

    Args:
        obsolete: names of files that an earlier result may have, and this one has not.
    """
    remove_files(folder, [*list(files)[-1:], *obsolete])
    for name, content in files.items():
        write_bytes(join(folder, name), content)


def remove_files(folder: str, names: Iterable[str]) -> None:
    """Remove the temporary files of a folder, and the named files that are there."""
    remove_temporaries(folder)
    found = list_names(folder)  # a store may allow to list and to write, and not to delete
    for name in names:
        if name in found:
            remove(join(folder, name))


def create_bytes(uri: str, content: bytes) -> bool:
    """Write a new file atomically; return False if it exists already."""
    with _convert_errors(uri):
        if is_local(uri):
            return not os.path.lexists(local_path(uri)) and _create_local(local_path(uri), content)
        if uri.startswith("s3://"):
            return put_object(*split_s3(uri), content, only_new=True)
        if exists(uri):
            return False
        call(uri, "pipe_file", content)
    return True


def replace_bytes(uri: str, content: bytes, version: str) -> bool:
    """Replace a file atomically if it still has the version that `read_versioned` returned; else return False."""
    with _convert_errors(uri):
        if is_local(uri):
            return _replace_local(local_path(uri), content, version)
        if uri.startswith("s3://"):
            return put_object(*split_s3(uri), content, only_over=version)
        found = read_versioned(uri)
        if found is None or found[1] != version:
            return False
        call(uri, "pipe_file", content)
    return True


def read_version(uri: str) -> str | None:
    """Read the version of a file for `write_over`, without its content; None if there is no file, or no conditions."""
    try:
        if is_local(uri):
            return local_write_version(os.stat(local_path(uri)))
        return read_etag(*split_s3(uri)) if uri.startswith("s3://") else None
    except FileNotFoundError:
        return None
    except STORE_ERRORS as error:
        check_credentials(error)
        raise to_store_error(error, f"cannot read {uri}: {getattr(error, 'strerror', None) or error}") from error


def write_over(uri: str, content: bytes, version: str | None) -> bool:
    """Write a file atomically if it has the version that `read_version` returned; else return False.

    Stores without conditions, all but local disks and S3, write in any case.
    """
    if not is_local(uri) and not uri.startswith("s3://"):
        write_bytes(uri, content)
        return True
    return create_bytes(uri, content) if version is None else replace_bytes(uri, content, version)


def remove(uri: str) -> None:
    """Remove a file if it exists."""
    with _convert_errors(uri), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            os.unlink(local_path(uri))
        elif uri.startswith("s3://"):
            bucket, key = split_s3(uri)
            request_sync("delete_object", Bucket=bucket, Key=key)
        else:
            call(uri, "rm_file")


def remove_empty_folder(uri: str) -> None:
    """Remove a local folder if it exists and is empty; other stores have no empty folders."""
    if is_local(uri):
        with contextlib.suppress(OSError):
            os.rmdir(local_path(uri))


def is_temporary(name: str) -> bool:
    """Return whether a name in a folder is that of a temporary file of this module."""
    return TEMPORARY.fullmatch(os.fsencode(name)) is not None


def remove_temporaries(uri: str) -> None:
    """Remove the temporary files that killed writers left in a folder; only local writes use them."""
    if not is_local(uri):
        return
    folder = local_path(uri)
    with _convert_errors(uri), contextlib.suppress(FileNotFoundError):
        for name in filter(TEMPORARY.fullmatch, os.listdir(folder)):
            remove_if_stale(os.path.join(folder, name))


@contextlib.contextmanager
def _convert_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except STORE_ERRORS as error:
        check_credentials(error)
        error_class = NotRetryableError if _is_final(error) else RunError
        raise error_class(f"cannot write {uri}: {getattr(error, 'strerror', None) or error}") from error


def _is_final(error: BaseException) -> bool:
    """Return whether a write would fail again."""
    if isinstance(error, OSError):
        return error.errno in NOT_RETRYABLE or isinstance(error, PermissionError)
    return read_error_code(error) in REFUSED | FULL_STORE


@contextlib.contextmanager
def _written(path: bytes, content: bytes) -> Iterator[bytes]:
    """Write a temporary file beside the target. The caller links or renames it; then the folder is synced.

    It is locked until then, so that no other process removes it.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, b"." + name[:40] + b"." + secrets.token_hex(8).encode() + b".catsdogs")
    try:
        with open(temporary, "xb") as file:
            lock(file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(folder)


def _create_local(path: bytes, content: bytes) -> bool:
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            logger.debug("no hard links in this file system", exc_info=True)
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
    return True


def _replace_local(path: bytes, content: bytes, version: str) -> bool:
    try:
        if local_write_version(os.stat(path)) != version:
            return False
    except FileNotFoundError:
        return False
    with _written(path, content) as temporary:
        os.replace(temporary, path)
    return True


def _sync_folder(folder: bytes) -> None:
    """Make the names in a folder durable, if its file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        logger.debug("cannot sync a folder", exc_info=True)
    finally:
        os.close(descriptor)
