"""URI -> file system and path."""

import os
import re
import urllib.parse
from typing import Any

import fsspec

from catsdogs.errors import InputError
from catsdogs.storage.objects import names_under, object_exists
from catsdogs.storage.s3 import S3_OPTIONS, STORE_ERRORS, check_credentials, read_error_code, split_s3, to_store_error

# Of a URL that is a key by itself: S3's two kinds, Google's, Azure's.
SIGNATURE = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)


def is_local(uri: str) -> bool:
    """Whether `uri` names a file or folder of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> bytes:
    """Name a local URI the way the operating system does, in bytes."""
    if uri.startswith("file://"):
        return urllib.parse.unquote_to_bytes(uri.removeprefix("file://"))
    return os.fsencode(uri)


def local_uri(path: bytes) -> str:
    """Name an absolute local path: as it is, or percent-encoded where it is not UTF-8."""
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        return quoted_uri(path)


def quoted_uri(path: bytes) -> str:
    """Percent-encode a local path into a `file://` URI."""
    return "file://" + urllib.parse.quote_from_bytes(path)


def absolute(uri: str) -> str:
    """Make a local path absolute and drop a trailing slash; leave other URIs as they are.

    Raises:
        InputError: no name at all, a scheme that fsspec does not open, or credentials in it.
    """
    if not uri:
        raise InputError("an empty path: expected a folder, a file or a URI such as s3://bucket/prefix")
    if is_local(uri):
        return local_uri(os.path.abspath(local_path(uri)))
    if "@" in uri.split("://", 1)[1].partition("/")[0] or SIGNATURE.search(uri):
        raise InputError(
            "a URI with credentials in it: they would be written to logs and files; expected them in the environment "
            "or the store's own configuration"
        )
    if _scheme(uri) != "s3":
        filesystem(uri)
        return uri.rstrip("/")
    bucket, key = split_s3(f"s3://{uri[5:]}")
    if not bucket:
        raise InputError(f"no bucket in {uri}: expected s3://bucket/prefix")
    return f"s3://{bucket}/{key}".rstrip("/")


def join(uri: str, *names: str) -> str:
    """Append path components to a folder's URI."""
    quoted = [urllib.parse.quote(name) for name in names] if uri.startswith("file://") else names
    return "/".join([uri.rstrip("/"), *quoted])


def parent_name(uri: str) -> str:
    """Name the folder that a file stands in, without the folders above; empty where there is none."""
    folder = uri.rpartition("/")[0].rpartition("/")[2]
    return folder_name(urllib.parse.unquote_to_bytes(folder)) if uri.startswith("file://") else folder


def folder_name(name: bytes) -> str:
    """Name a local folder: as it is, or percent-encoded where it is not UTF-8."""
    return local_uri(name).removeprefix("file://")


def _scheme(uri: str) -> str:
    return uri.partition("://")[0].lower()


def filesystem(uri: str) -> Any:
    """Open the fsspec file system of a URI; S3 takes endpoint and credentials from the standard AWS chain.

    Raises:
        InputError: the scheme is unknown or its package is not installed.
    """
    scheme = "file" if is_local(uri) else _scheme(uri)
    options = S3_OPTIONS if scheme == "s3" else {}
    try:
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot open {uri}: {error}") from error


def fs_path(uri: str) -> str:
    """Name a URI the way its fsspec file system does."""
    if is_local(uri):
        return os.fsdecode(local_path(uri))
    if uri.startswith("s3://"):
        return uri.split("://", 1)[1]
    return str(filesystem(uri)._strip_protocol(uri))


def exists(uri: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        InputError: the store does not tell.
        RunError: the credentials are missing, wrong or expired, or the store does not answer.
    """
    if is_local(uri):
        return os.path.lexists(local_path(uri))
    try:
        if uri.startswith("s3://"):
            return object_exists(*split_s3(uri))
        return bool(filesystem(uri).exists(fs_path(uri)))
    except STORE_ERRORS as error:
        check_credentials(error)
        raise to_store_error(error, f"cannot look for {uri}: {error}; check its policy and the endpoint") from error


def list_names(uri: str) -> list[str]:
    """Name what stands directly in a folder, sorted; empty where there is no such folder.

    Raises:
        InputError: it cannot be listed.
        RunError: the credentials are missing, wrong or expired, or the store does not answer.
    """
    try:
        if is_local(uri):
            return sorted(os.fsdecode(name) for name in os.listdir(local_path(uri)))
        if uri.startswith("s3://"):
            return names_under(*split_s3(uri))
        found = filesystem(uri).ls(fs_path(uri), detail=False)
    except NotADirectoryError as error:
        raise InputError(f"{uri}: expected a folder, found a file") from error
    except FileNotFoundError:
        return []
    except STORE_ERRORS as error:
        check_credentials(error)
        if read_error_code(error) == "NoSuchBucket":
            raise InputError(f"no such bucket: {uri}") from error
        raise to_store_error(error, f"cannot list {uri}: {error}; check its permissions") from error
    return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})
