"""Parse URIs, and list the names in a folder."""

import os
import re
import urllib.parse

from catsdogs.errors import InputError
from catsdogs.storage.http_listing import list_page
from catsdogs.storage.http_store import is_http
from catsdogs.storage.other_stores import call, filesystem, url_exists
from catsdogs.storage.s3 import STORE_ERRORS, check_credentials, read_error_code, split_s3, to_store_error
from catsdogs.storage.s3_listing import find_object, list_names_under

# Parameters of a query with credentials: the signature of a presigned URL of S3, Google or Azure, tokens, API keys.
CREDENTIALS = re.compile(
    r"[?&]([^=&]*(signature|token|secret|passw|credential|auth|api[_-]?key|access[_-]?key)[^=&]*|sig|pwd)=",
    re.IGNORECASE,
)

DIRECTORY_BUCKET = "--x-s3"  # the end of its name


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def find_scheme(uri: str) -> str:
    """Return the scheme of a URI in lower case; `file` for a path of this machine."""
    return "file" if is_local(uri) else uri.partition("://")[0].lower()


def local_path(uri: str) -> bytes:
    """Return the path of a local URI in the bytes that the operating system uses."""
    if uri.startswith("file://"):
        return urllib.parse.unquote_to_bytes(uri.removeprefix("file://"))
    return os.fsencode(uri)


def local_uri(path: bytes) -> str:
    """Return the URI of an absolute local path: the path, or percent-encoded if it is not UTF-8."""
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
        InputError: the URI is empty, contains credentials or what no name can have, is relative to a deleted folder, or
            its scheme or bucket cannot be opened.
    """
    if not uri:
        raise InputError("an empty path: expected a folder, a file or a URI such as s3://bucket/prefix")
    _check_characters(uri)
    if is_local(uri):
        try:
            return local_uri(os.path.abspath(local_path(uri)))
        except FileNotFoundError as error:
            raise InputError(
                f"{uri}: expected an absolute path, since the current folder does not exist any more"
            ) from error
    if "@" in uri.split("://", 1)[1].partition("/")[0] or _has_credentials(uri):
        raise InputError(
            "a URI with credentials in it: they would be written to logs and files; pass them in the environment or in "
            "the configuration of the store"
        )
    if is_http(uri):
        _check_host(uri)
    if not uri.lower().startswith("s3://"):
        filesystem(uri)
        return uri.rstrip("/")
    bucket, key = split_s3(f"s3://{uri[5:]}")
    if not bucket:
        raise InputError(f"no bucket in {uri}: expected s3://bucket/prefix")
    if bucket.endswith(DIRECTORY_BUCKET):  # its listings have no order, and its etags are no versions of the content
        raise InputError(
            f"{uri}: expected a general purpose bucket, found a directory bucket (S3 Express); copy the files"
        )
    return f"s3://{bucket}/{key}".rstrip("/")


def _check_characters(uri: str) -> None:
    """Refuse zero bytes and half characters, which JSON and Parquet may have."""
    try:
        name = local_path(uri) if is_local(uri) else uri.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{uri[:200]!a}: expected a path of whole characters") from error
    if b"\0" in name:
        raise InputError(f"{uri[:200]!a}: expected a path without zero bytes")


def _has_credentials(uri: str) -> bool:
    _, mark, query = uri.partition("?")
    return any(map(CREDENTIALS.search, (uri, mark + urllib.parse.unquote(query))))


def _check_host(uri: str) -> None:
    """Refuse a URL without a host; a password with a slash looks like a port."""
    try:
        parts = urllib.parse.urlsplit(uri)
        if parts.hostname and parts.port != 0:
            return
    except ValueError:
        pass
    raise InputError("a URL without a valid host and port: expected https://HOST/PATH or https://HOST:PORT/PATH")


def join(uri: str, *names: str) -> str:
    """Append path components to the URI of a folder."""
    quoted = [urllib.parse.quote(name) for name in names] if uri.startswith("file://") else names
    return "/".join([uri.rstrip("/"), *quoted])


def parent(uri: str) -> str:
    """Return the URI of the folder that contains a file."""
    return uri.rpartition("/")[0] or "/"


def parent_name(uri: str) -> str:
    """Return the name of the folder that contains a file; empty if there is none."""
    folder = uri.rpartition("/")[0].rpartition("/")[2]
    return folder_name(urllib.parse.unquote_to_bytes(folder)) if uri.startswith("file://") else folder


def folder_name(name: bytes) -> str:
    """Return the name of a local folder, percent-encoded if it is not UTF-8."""
    return local_uri(name).removeprefix("file://")


def exists(uri: str) -> bool:
    """Whether a file exists.

    Raises:
        InputError: the request is refused.
        RunError: a later attempt may succeed.
    """
    if is_local(uri):
        return os.path.lexists(local_path(uri))
    if uri.startswith("s3://"):
        return find_object(uri) is not None
    try:
        return url_exists(uri) if is_http(uri) else bool(call(uri, "exists"))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise to_store_error(error, f"cannot read {uri}: {error}") from error


def list_names(uri: str) -> list[str]:
    """List the names directly in a folder, sorted; empty if there is no such folder.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        if is_local(uri):
            return sorted(os.fsdecode(name) for name in os.listdir(local_path(uri)))
        if uri.startswith("s3://"):
            return list_names_under(*split_s3(uri))
        found = list_page(uri) if is_http(uri) else call(uri, "ls", detail=False)
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
