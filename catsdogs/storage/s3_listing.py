"""Paged listings of S3, which are not trusted to be complete or in order."""

from collections.abc import Iterator
from typing import Any

from catsdogs.errors import RunError
from catsdogs.storage.objects import read_etag, request_sync
from catsdogs.storage.retrying import BrokenBodyError
from catsdogs.storage.s3 import (
    STORE_ERRORS,
    MalformedResponseError,
    Response,
    check_credentials,
    split_s3,
    to_store_error,
)

MAX_SIZE_BYTES = (1 << 63) - 1  # of the column size_bytes
MAX_EMPTY_PAGES = 1000  # in a row; a page without keys may precede others


async def _check_page(page: Response) -> Response:
    if "IsTruncated" not in page:  # an empty body is parsed as an empty listing
        raise BrokenBodyError("the body of a listing broke off")
    return page


def list_pages(bucket: str, prefix: str, **parameters: Any) -> Iterator[Response]:
    """List a prefix in pages of 1,000 keys.

    Raises:
        RunError: the store repeats a page, sends no way to the next one, or one that is malformed.
    """
    uri = f"s3://{bucket}/{prefix}"
    tokens: set[str] = set()
    num_empty = 0
    while True:
        try:
            page = request_sync("list_objects_v2", read=_check_page, Bucket=bucket, Prefix=prefix, **parameters)
        except MalformedResponseError as error:
            raise _broken_listing(uri, f"sends a page that cannot be parsed ({error})") from error
        _check_items(uri, page)
        yield page
        if not page.get("IsTruncated"):
            return
        num_empty = 0 if page.get("Contents") or page.get("CommonPrefixes") else num_empty + 1
        token = page.get("NextContinuationToken") or ""
        if fault := _find_paging_fault(token, tokens, num_empty):
            raise _broken_listing(uri, fault)
        tokens.add(token)
        parameters["ContinuationToken"] = token


def _find_paging_fault(token: str, tokens: set[str], num_empty: int) -> str:
    if not token:
        return "says that more keys follow, and sends no continuation token"
    if token in tokens:
        return f"repeats a continuation token after {len(tokens)} pages"
    # SeaweedFS sends the last key, with U+FFFD for a character that XML lacks; the next page would have no keys.
    if "\ufffd" in token:
        return "sends a continuation token that lost a character of a key"
    return f"sends {num_empty:,} pages without keys" if num_empty > MAX_EMPTY_PAGES else ""


def _check_items(uri: str, page: Response) -> None:
    """Raise RunError if a page has an item without a name, or a value of another type; a list is one sent twice."""
    for item in page.get("Contents", ()):
        size_bytes = item.get("Size")
        if not isinstance(item.get("Key"), str):
            raise _broken_listing(uri, "lists an object without a key, or with two")
        if size_bytes is not None and not 0 <= size_bytes <= MAX_SIZE_BYTES:
            raise _broken_listing(uri, f"lists {item['Key'][:80]!r} with an impossible size")
        if not isinstance(item.get("ETag", ""), str):
            raise _broken_listing(uri, f"lists {item['Key'][:80]!r} with two etags")
    if not all(isinstance(item.get("Prefix"), str) for item in page.get("CommonPrefixes", ())):
        raise _broken_listing(uri, "lists a prefix without a name, or with two")
    if not isinstance(page.get("NextContinuationToken", ""), str):
        raise _broken_listing(uri, "sends two continuation tokens")


def _broken_listing(uri: str, fault: str) -> RunError:
    return RunError(f"cannot list {uri}: the store {fault}, unlike S3; check or update the store, or use a path list")


def list_objects(uri: str, bucket: str, prefix: str, start_after: str = "") -> Iterator[dict[str, Any]]:
    """List every object under a prefix whose key is after `start_after`, in the order of the keys' bytes.

    Raises:
        InputError: the bucket does not exist or must not be listed.
        RunError: the store lists other keys, or in another order.
    """
    for page in list_object_pages(uri, bucket, prefix, start_after):
        yield from page


def list_object_pages(uri: str, bucket: str, prefix: str, start_after: str = "") -> Iterator[list[dict[str, Any]]]:
    """List the same as `list_objects` in pages, which may be empty."""
    previous = start_after.encode()
    try:
        for page in list_pages(bucket, prefix, **({"StartAfter": start_after} if start_after else {})):
            items = page.get("Contents", [])
            for item in items:
                key = item["Key"]
                if not key.startswith(prefix):
                    raise _broken_listing(uri, f"lists {key[:80]!r}, which is not below the prefix")
                if previous and key.encode() <= previous:
                    after = previous.decode()[:80]
                    raise _broken_listing(uri, f"lists {key[:80]!r} after {after!r}, not in the order of their bytes")
                previous = key.encode()
            yield items
    except STORE_ERRORS as error:
        check_credentials(error)
        raise to_store_error(
            error, f"cannot list {uri}: {error}; check the bucket, its policy and the endpoint"
        ) from error


def find_object(uri: str) -> dict[str, Any] | None:
    """Find an object by a listing: the response to a HEAD request cannot say that the credentials expired."""
    bucket, key = split_s3(uri)
    first = next(list_objects(uri, bucket, key), None) if key else None
    return first if first is not None and first["Key"] == key else None


def list_names_under(bucket: str, folder: str) -> list[str]:
    """List the names directly under a prefix, sorted.

    Raises:
        NotADirectoryError: the prefix is the key of an object.
    """
    prefix = f"{folder}/" if folder else ""
    names = set()
    for page in list_pages(bucket, prefix, Delimiter="/"):
        names |= {item["Key"][len(prefix) :] for item in page.get("Contents", ())}
        names |= {item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", ())}
    if not names and folder and read_etag(bucket, folder) is not None:
        raise NotADirectoryError(folder)
    return sorted(names - {""})
