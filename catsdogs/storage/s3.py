"""Requests to S3, and whose fault an error is.

s3fs holds the session and the client; every request goes through `request`, the only one that repeats any.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import fsspec
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.storage.retrying import is_retryable, with_retries

# What a call to a store raises: s3fs translates most of botocore's errors into OSErrors.
STORE_ERRORS = (OSError, ClientError, BotoCoreError)
# A process reads 32 images at once and still lists and writes.
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "max_pool_connections": 64,
        "connect_timeout": 10,
        "read_timeout": 20,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    },
}
MISSING = {"404", "NoSuchKey", "NotFound"}
REFUSED = {"403", "AccessDenied", "AllAccessDisabled", "Forbidden"}
Response = dict[str, Any]
T = TypeVar("T")
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
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
# What fetches credentials, by the client's name of the request: a refusal of it is none of the object.
CREDENTIAL_REQUESTS = {
    "AssumeRole",
    "AssumeRoleWithSAML",
    "AssumeRoleWithWebIdentity",
    "CreateToken",
    "GetRoleCredentials",
}


def split_s3(uri: str) -> tuple[str, str]:
    """Cut `s3://bucket/key` at the first slash after the bucket; nothing is unquoted."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def read_error_code(error: BaseException) -> str:
    """Name an answer's error, or nothing where there was no answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


async def request(operation: str, read: Callable[[Response], Awaitable[Any]] | None = None, **parameters: Any) -> Any:
    """Make one request of a bucket, again where that may help.

    Args:
        operation: a method of the S3 client, such as get_object.
        read: what to make of the answer while its connection is open.

    Returns:
        What `read` made of it, else the answer; and how often it was asked again.

    Raises:
        OSError, ClientError, BotoCoreError: as the client raises them.
        RunError: the store does not answer.
    """
    fs = fsspec.filesystem("s3", **S3_OPTIONS)
    bucket = parameters["Bucket"]
    await fs.set_session()
    client = await fs.get_s3(bucket)

    async def ask() -> Any:
        try:
            response: Response = await getattr(client, operation)(**parameters)
        except RuntimeError as error:  # of botocore, which has no class for it
            if "Credentials were refreshed" not in str(error):
                raise
            raise CredentialRetrievalError(provider="the AWS chain", error_msg=error) from error
        return response if read is None else await read(response)

    return await with_retries(ask, lambda: client.list_objects_v2(Bucket=bucket, MaxKeys=1))


def submit(ask: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **parameters: Any) -> Future[T]:
    """Begin a coroutine of requests on the client's own loop."""
    loop = fsspec.filesystem("s3", **S3_OPTIONS).loop
    return asyncio.run_coroutine_threadsafe(ask(*arguments, **parameters), loop)


def run_sync(ask: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **parameters: Any) -> T:
    """Run a coroutine of requests on the client's own loop, and wait."""
    return submit(ask, *arguments, **parameters).result()


def to_store_error(error: BaseException, message: str) -> CatsdogsError:
    """Make the error of a request that failed: ours to go on from where it may pass, else the user's to mend."""
    return RunError(message) if is_retryable(error) else InputError(message)


def check_credentials(error: BaseException) -> None:
    """Stop the job where the store refuses the caller, not the object.

    Raises:
        RunError: the credentials are missing, wrong or expired.
    """
    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    fetching = isinstance(cause, ClientError) and cause.operation_name in CREDENTIAL_REQUESTS
    if fetching or read_error_code(cause) in CREDENTIAL_CODES or isinstance(cause, CREDENTIAL_ERRORS):
        raise RunError(
            f"the S3 credentials are missing, wrong or expired ({read_error_code(cause) or type(cause).__name__}): renew them "
            "in the standard AWS chain (environment, ~/.aws, instance profile) and run again"
        ) from error
