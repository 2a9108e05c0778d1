"""S3's own calls, through s3fs: a listing page by page, one GET an object, whose fault an error is."""

import asyncio
from collections.abc import Iterator
from typing import Any

import fsspec
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

from catsdogs.errors import InputError, RunError

# What a call to a store raises: s3fs translates most of botocore's errors into OSErrors.
STORE_ERRORS = (OSError, ClientError, BotoCoreError)
# A process reads 32 images at once and still lists and writes.
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {"max_pool_connections": 64, "retries": {"mode": "standard", "max_attempts": 8}},
}
BODY_TRIES = 4  # a body that breaks off is read again from its beginning
CREDENTIAL_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
CREDENTIAL_ERRORS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)


def split_s3(uri: str) -> tuple[str, str]:
    """Cut `s3://bucket/key` at the first slash after the bucket; nothing is unquoted."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def list_objects(uri: str, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """List every object under a prefix, a page of 1,000 at a time.

    Raises:
        InputError: the bucket is not there or may not be listed.
        RunError: the credentials are missing, wrong or expired.
    """
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    fs = fsspec.filesystem("s3", **S3_OPTIONS)
    while True:
        try:
            page = fs.call_s3("list_objects_v2", **request)
        except STORE_ERRORS as error:
            check_credentials(error)
            raise InputError(f"cannot list {uri}: {error}; check the bucket, its policy and the endpoint") from error
        yield from page.get("Contents", ())
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


async def get_object(fs: Any, bucket: str, key: str) -> tuple[bytes, str]:
    """Read one object whole; its content and etag.

    Raises:
        OSError, ClientError, BotoCoreError: as s3fs raises them, or the body broke off every time.
    """
    reason: object = "fewer bytes than announced"
    for attempt in range(BODY_TRIES):
        await asyncio.sleep(0.1 * (2**attempt - 1))
        response = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        try:
            async with response["Body"] as body:
                content: bytes = await body.read()
        except Exception as error:  # noqa: BLE001 - the HTTP client's errors are not botocore's
            reason = error
        else:
            if len(content) == response.get("ContentLength", len(content)):
                return content, response["ETag"].strip('"')
    raise OSError(f"the body broke off {BODY_TRIES} times: {reason}")


def check_credentials(error: BaseException) -> None:
    """Stop the job where the store refuses the caller, not the object.

    Raises:
        RunError: the credentials are missing, wrong or expired.
    """
    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    code = cause.response["Error"].get("Code", "") if isinstance(cause, ClientError) else ""
    if code in CREDENTIAL_CODES or isinstance(cause, CREDENTIAL_ERRORS):
        raise RunError(
            f"the S3 credentials are missing, wrong or expired ({code or type(cause).__name__}): renew them "
            "in the standard AWS chain (environment, ~/.aws, instance profile) and run again"
        ) from error
