"""Operations on S3 objects: one GET per object, conditional writes."""

import asyncio
import hashlib
import logging
import re
from typing import Any

from botocore.exceptions import ClientError

from catsdogs.storage.event_loop import run_sync
from catsdogs.storage.limits import BODY_TIMEOUT_S, MAX_FILE_BYTES, MIN_BODY_BYTES_PER_S, check_length
from catsdogs.storage.retrying import BrokenBodyError, transport_errors
from catsdogs.storage.s3 import MISSING, Response, read_error_code, request

CHUNK_BYTES = 1 << 20  # of a body whose length is not announced
PRECONDITION, UNSUPPORTED = {"412", "PreconditionFailed"}, {"501", "NotImplemented"}

logger = logging.getLogger(__name__)


def request_sync(operation: str, **parameters: Any) -> Response:
    """Make a request and wait for its response."""
    result: tuple[Response, int] = run_sync(request, operation, **parameters)
    return result[0]


async def get_object(
    bucket: str, key: str, *, size_bytes: int | None = None, etag: str | None = None, limit_bytes: int
) -> tuple[bytes, str, int]:
    """Read one object.

    Args:
        size_bytes: the size that was listed together with `etag`; a larger object raises TooLongError.
        limit_bytes: a larger object raises TooLongError before more of it is in memory.

    Returns:
        The content, the etag, and the number of retries.

    Raises:
        OSError, ClientError, BotoCoreError: from the client; also TooLongError, and BrokenBodyError if the body broke
            off in every attempt.
    """

    async def read(response: Response) -> tuple[bytes, str]:
        announced, found = response.get("ContentLength"), (response.get("ETag") or "").strip('"')
        max_bytes = limit_bytes if size_bytes is None else min(limit_bytes, size_bytes)
        if announced is not None and announced > max_bytes:
            response["Body"].close()
            check_length(announced, max_bytes)
        content = await _read_body(response, announced, max_bytes)
        expected = size_bytes if found == etag and size_bytes is not None else announced
        if expected is not None and len(content) != expected:
            raise BrokenBodyError(f"the body broke off after {len(content)} of {expected} bytes")
        if size_bytes is None and _is_md5(response, found) and _md5(content) != found:
            raise BrokenBodyError(f"the body of {len(content)} bytes does not match its etag")
        return content, found

    (content, found), retries = await request("get_object", read, Bucket=bucket, Key=key)
    return content, found, retries


async def _read_body(response: Response, announced_bytes: int | None, limit_bytes: int) -> bytes:
    started_s = asyncio.get_running_loop().time()
    content = bytearray()
    try:
        allowed_s = BODY_TIMEOUT_S + (announced_bytes or 0) / MIN_BODY_BYTES_PER_S
        async with asyncio.timeout_at(started_s + allowed_s) as timeout, response["Body"] as body:
            if announced_bytes is not None:
                return bytes(await body.read())
            while chunk := await body.read(min(CHUNK_BYTES, limit_bytes - len(content) + 1)):
                content += chunk
                check_length(len(content), limit_bytes)
                timeout.reschedule(started_s + BODY_TIMEOUT_S + len(content) / MIN_BODY_BYTES_PER_S)
    except transport_errors() as error:
        raise BrokenBodyError(f"the body broke off: {str(error) or 'it took too long'}") from error
    return bytes(content)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()  # of an etag; FIPS refuses it for security


def _is_md5(response: Response, etag: str) -> bool:
    """Whether an etag is the MD5 of the content: not a multipart upload, not encrypted with a customer's key."""
    plain = response.get("ServerSideEncryption") in (None, "AES256") and not response.get("SSECustomerAlgorithm")
    return plain and re.fullmatch("[0-9a-f]{32}", etag) is not None


def read_etag(bucket: str, key: str) -> str | None:
    """Return the etag of an object; None if there is no object."""
    try:
        return str(request_sync("head_object", Bucket=bucket, Key=key).get("ETag") or "").strip('"')
    except ClientError as error:
        if read_error_code(error) in MISSING:
            return None
        raise


def put_object(bucket: str, key: str, content: bytes, only_over: str | None = None, only_new: bool = False) -> bool:
    """Write an object in one request.

    Args:
        only_over: the etag of the object to replace; an object with another etag is kept.
        only_new: an existing object is kept.

    Returns:
        Whether the object was written.
    """
    condition = {"IfNoneMatch": "*"} if only_new else {"IfMatch": f'"{only_over}"'} if only_over is not None else {}
    try:
        request_sync("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    except ClientError as error:
        code = read_error_code(error)
        if not condition or code not in PRECONDITION | MISSING | UNSUPPORTED:
            raise
        logger.debug("s3://%s/%s: the conditional write was refused", bucket, key, exc_info=True)
        if code in PRECONDITION:  # an earlier attempt may have written it and lost its response
            return _read_content(bucket, key) == content
        if code in MISSING or read_etag(bucket, key) != only_over:
            return False
        request_sync("put_object", Bucket=bucket, Key=key, Body=content)  # the store supports no conditions
    return True


def _read_content(bucket: str, key: str) -> bytes | None:
    """Read one object; None if there is no object."""
    try:
        return run_sync(get_object, bucket, key, limit_bytes=MAX_FILE_BYTES)[0]
    except ClientError as error:
        if read_error_code(error) in MISSING:
            return None
        raise
