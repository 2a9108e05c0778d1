"""URI -> file system and path."""

import os
import urllib.parse
from typing import Any

import fsspec
import pyarrow.fs

from catsdogs.errors import InputError
from catsdogs.storage.s3 import S3_OPTIONS, split_s3


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
        InputError: no name at all, or a scheme that fsspec does not open.
    """
    if not uri:
        raise InputError("an empty path: expected a folder, a file or a URI such as s3://bucket/prefix")
    if is_local(uri):
        return local_uri(os.path.abspath(local_path(uri)))
    if urllib.parse.urlsplit(uri).scheme != "s3":
        filesystem(uri)
        return uri.rstrip("/")
    bucket, key = split_s3(uri)
    if not bucket or "@" in bucket:
        raise InputError("an S3 URI is s3://bucket/prefix; credentials come from the standard AWS chain")
    return f"s3://{bucket}/{key}".rstrip("/")


def join(uri: str, *names: str) -> str:
    """Append path components to a folder's URI."""
    quoted = [urllib.parse.quote(name) for name in names] if uri.startswith("file://") else names
    return "/".join([uri.rstrip("/"), *quoted])


def parent_name(uri: str) -> str:
    """Name the folder that a file stands in, without the folders above; empty where there is none."""
    folder = uri.rpartition("/")[0].rpartition("/")[2]
    return urllib.parse.unquote(folder, errors="replace") if uri.startswith("file://") else folder


def filesystem(uri: str) -> Any:
    """Open the fsspec file system of a URI; S3 takes endpoint and credentials from the standard AWS chain.

    Raises:
        InputError: the scheme is unknown or its package is not installed.
    """
    scheme = "file" if is_local(uri) else urllib.parse.urlsplit(uri).scheme
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


def arrow_filesystem(uri: str) -> pyarrow.fs.FileSystem:
    """Open a URI's file system for pyarrow and Ray, which take odd S3 keys for local paths where they are given none."""
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem(uri)))


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return os.path.lexists(local_path(uri))
    return bool(filesystem(uri).exists(fs_path(uri)))


def list_names(uri: str) -> list[str]:
    """Name what stands directly in a folder, sorted; empty where there is no such folder."""
    if is_local(uri):
        path = local_path(uri)
        return sorted(os.fsdecode(name) for name in os.listdir(path)) if os.path.isdir(path) else []
    try:
        found = filesystem(uri).ls(fs_path(uri), detail=False)
    except FileNotFoundError:
        return []
    return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})
