"""Objects of S3: a listing page by page, one GET an object, writes that replace nothing unseen."""

import asyncio
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from catsdogs.storage.retrying import BrokenBodyError, transport_errors
from catsdogs.storage.s3 import (
    MISSING,
    STORE_ERRORS,
    Response,
    check_credentials,
    read_error_code,
    request,
    run_sync,
    to_store_error,
)

BODY_S, BODY_BYTES_PER_S = 20.0, 100_000  # a body takes no longer than the first, and a second for so many bytes
NO_LIMIT = 1 << 62
PRECONDITION, UNSUPPORTED = {"412", "PreconditionFailed"}, {"501", "NotImplemented"}


class TooLongError(OSError):
    """A file of more bytes than are wanted."""


def check_length(num_bytes: int, limit_bytes: int) -> None:
    """Refuse to read what is too long.

    Raises:
        TooLongError: it is.
    """
    if num_bytes > limit_bytes:
        raise TooLongError(
            f"{num_bytes} bytes, more than the {limit_bytes >> 20} MiB that reading and decoding may take"
        )


def request_now(operation: str, **parameters: Any) -> Response:
    """Make a request and wait for its answer."""
    answer: tuple[Response, int] = run_sync(request, operation, **parameters)
    return answer[0]


async def _whole_page(page: Response) -> Response:
    if "IsTruncated" not in page:  # an empty body reads as an empty listing
        raise BrokenBodyError("the body of a listing broke off")
    return page


def list_pages(bucket: str, prefix: str, **parameters: Any) -> Iterator[Response]:
    """List a prefix, a page of 1,000 at a time."""
    while True:
        page = request_now("list_objects_v2", read=_whole_page, Bucket=bucket, Prefix=prefix, **parameters)
        yield page
        if not page.get("IsTruncated"):
            return
        parameters["ContinuationToken"] = page["NextContinuationToken"]


def list_objects(uri: str, bucket: str, prefix: str, start_after: str = "") -> Iterator[dict[str, Any]]:
    """List every object under a prefix, those after a key only.

    Raises:
        InputError: the bucket is not there or may not be listed.
        RunError: the credentials are missing, wrong or expired, or the store does not answer.
    """
    try:
        for page in list_pages(bucket, prefix, **({"StartAfter": start_after} if start_after else {})):
            yield from page.get("Contents", ())
    except STORE_ERRORS as error:
        check_credentials(error)
        raise to_store_error(
            error, f"cannot list {uri}: {error}; check the bucket, its policy and the endpoint"
        ) from error


def names_under(bucket: str, folder: str) -> list[str]:
    """Name what stands directly under a prefix, sorted.

    Raises:
        NotADirectoryError: the prefix is the name of an object.
    """
    prefix = f"{folder}/" if folder else ""
    names = set()
    for page in list_pages(bucket, prefix, Delimiter="/"):
        names |= {item["Key"][len(prefix) :] for item in page.get("Contents", ())}
        names |= {item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", ())}
    if not names and folder and head_object(bucket, folder) is not None:
        raise NotADirectoryError(folder)
    return sorted(names - {""})


def object_exists(bucket: str, key: str) -> bool:
    """Whether there is an object, or a prefix of objects, or with no key the bucket."""
    if not key:
        try:
            request_now("head_bucket", Bucket=bucket)
        except ClientError as error:
            if read_error_code(error) in MISSING | {"NoSuchBucket"}:
                return False
            raise
        return True
    # Not a HEAD: its answer has no body to say that the credentials expired.
    for prefix in (key, f"{key}/"):
        page = request_now("list_objects_v2", read=_whole_page, Bucket=bucket, Prefix=prefix, MaxKeys=1)
        if any(item["Key"] == key or item["Key"].startswith(f"{key}/") for item in page.get("Contents", ())):
            return True
    return False


async def get_object(
    bucket: str, key: str, *, size_bytes: int | None = None, etag: str | None = None, limit_bytes: int = NO_LIMIT
) -> tuple[bytes, str, int]:
    """Read one object whole.

    Args:
        size_bytes: as it was listed with `etag`.
        limit_bytes: of a longer one the body is not read.

    Returns:
        Its content, its etag, and how often it was asked for again.

    Raises:
        OSError, ClientError, BotoCoreError: as the client raises them; it is too long; its body broke off every time.
        RunError: the store does not answer.
    """

    async def read(response: Response) -> tuple[bytes, str]:
        announced = response.get("ContentLength")
        if announced is not None and announced > limit_bytes:
            response["Body"].close()
            check_length(announced, limit_bytes)
        try:
            async with asyncio.timeout(BODY_S + (announced or 0) / BODY_BYTES_PER_S), response["Body"] as body:
                content: bytes = await body.read()
        except transport_errors() as error:
            raise BrokenBodyError(f"the body broke off: {str(error) or 'it took too long'}") from error
        found = response["ETag"].strip('"')
        expected = size_bytes if found == etag and size_bytes is not None else announced
        if expected is not None and len(content) != expected:
            raise BrokenBodyError(f"the body broke off after {len(content)} of {expected} bytes")
        if size_bytes is None and _is_md5(response, found) and hashlib.md5(content).hexdigest() != found:
            raise BrokenBodyError(f"the body of {len(content)} bytes is not that of its etag")
        return content, found

    (content, found), retries = await request("get_object", read, Bucket=bucket, Key=key)
    return content, found, retries


def _is_md5(response: Response, etag: str) -> bool:
    """Whether an etag is the digest of the content: one upload, not encrypted with a key of the customer's."""
    plain = response.get("ServerSideEncryption") in (None, "AES256") and not response.get("SSECustomerAlgorithm")
    return plain and re.fullmatch("[0-9a-f]{32}", etag) is not None


def head_object(bucket: str, key: str) -> str | None:
    """Tell the etag of an object; None where there is none."""
    try:
        return str(request_now("head_object", Bucket=bucket, Key=key)["ETag"]).strip('"')
    except ClientError as error:
        if read_error_code(error) in MISSING:
            return None
        raise


def put_object(bucket: str, key: str, content: bytes, only_over: str | None = None, only_new: bool = False) -> bool:
    """Write an object in one request; whether the condition held.

    Args:
        only_over: the etag of the object to be replaced.
        only_new: only where there is no object.
    """
    condition = {"IfNoneMatch": "*"} if only_new else {"IfMatch": f'"{only_over}"'} if only_over is not None else {}
    try:
        request_now("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    except ClientError as error:
        if not condition or read_error_code(error) not in PRECONDITION | MISSING | UNSUPPORTED:
            raise
        if read_error_code(error) in PRECONDITION:  # by an earlier try of ours, whose answer got lost?
            found = read_object(bucket, key)
            return found is not None and found[0] == content
        if read_error_code(error) in MISSING or head_object(bucket, key) != only_over:
            return False
        request_now("put_object", Bucket=bucket, Key=key, Body=content)  # a store that knows no conditions
    return True


def delete_object(bucket: str, key: str) -> None:
    """Remove an object; absent is fine."""
    request_now("delete_object", Bucket=bucket, Key=key)


def read_object(bucket: str, key: str) -> tuple[bytes, str] | None:
    """Read one object and its etag; None where there is none."""
    try:
        content, etag, _ = run_sync(get_object, bucket, key)
    except ClientError as error:
        if read_error_code(error) in MISSING:
            return None
        raise
    return content, etag
