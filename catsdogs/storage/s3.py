"""The S3 client, its requests, and the classification of its errors.

s3fs creates the client from the standard AWS chain. Every request goes through `request`, which retries it; the client
itself does not retry. GETs of objects take the short way of `s3_gets`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import fsspec
from botocore import exceptions
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.storage.retrying import is_retryable, with_retries
from catsdogs.text import format_reason

logger = logging.getLogger(__name__)

# Errors of any store: fsspec's are OSErrors, the S3 client's are botocore's.
STORE_ERRORS = (OSError, ClientError, BotoCoreError)
# What botocore raises for a response without XML, with a number or a date that is none, or with one of them twice.
PARSER_ERRORS = (ResponseParserError, ValueError, TypeError, AttributeError, OverflowError)
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "max_pool_connections": 64,  # a process reads 32 images at once, and lists and writes meanwhile
        "connect_timeout": 10,
        "read_timeout": 20,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    },
}
MISSING = {"404", "NoSuchKey", "NotFound"}
REFUSED = {"403", "AccessDenied", "AllAccessDisabled", "Forbidden"}
Response = dict[str, Any]
GetObject = Callable[..., Awaitable[Response]]
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
    exceptions.CredentialRetrievalError,
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.ProfileNotFound,
    exceptions.SSOError,
    exceptions.TokenRetrievalError,
)
# Requests that fetch credentials: if one is refused, the credentials are the reason, not the object.
CREDENTIAL_REQUESTS = {
    "AssumeRole",
    "AssumeRoleWithSAML",
    "AssumeRoleWithWebIdentity",
    "CreateToken",
    "GetRoleCredentials",
}


class MalformedResponseError(OSError):
    """A response of the store cannot be parsed."""


def split_s3(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` at the first slash after the bucket; nothing is unquoted."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def read_error_code(error: BaseException) -> str:
    """Return the error code of a response; empty if the error is not a response."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


# A forked process has another loop. The file system is kept because it closes the client when it is collected.
_clients: dict[asyncio.AbstractEventLoop, tuple[Any, GetObject, Any]] = {}


async def _open_client() -> tuple[Any, GetObject, Any]:
    """Return the S3 client of the event loop that runs, the function that requests objects, and its file system."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        fs = fsspec.filesystem("s3", **S3_OPTIONS)
        client = await fs.set_session()
        if loop not in _clients:  # another request may have been first
            _clients[loop] = client, await open_gets(client, fs.session), fs
    return _clients[loop]


async def open_gets(client: Any, session: Any) -> GetObject:
    """Return the function that requests objects like `client.get_object`.

    Args:
        session: of aiobotocore, which made the client.
    """
    try:
        from catsdogs.storage.s3_gets import ObjectGets  # here, because it takes 0.2 s

        gets = await ObjectGets.open(client, session)
    except (ImportError, AttributeError, TypeError) as error:
        log_incompatible(error)
        get_object: GetObject = client.get_object
        return get_object
    return gets.get_object


def log_incompatible(error: Exception) -> None:
    """Log that GETs go through all layers of the client."""
    logger.debug("a GET without the layers of the client", exc_info=True)
    logger.warning("GETs of S3 objects take more CPU time, because aiobotocore has changed: %s", format_reason(error))


async def request(operation: str, read: Callable[[Response], Awaitable[Any]] | None = None, **parameters: Any) -> Any:
    """Make a request of a bucket, with retries.

    Args:
        operation: a method of the S3 client, such as get_object.
        read: reads the response while its connection is open.

    Returns:
        The result of `read`, or the response without it; and the number of retries.

    Raises:
        OSError, ClientError, BotoCoreError: from the client.
    """
    client, get_object, _ = await _open_client()

    async def make_request() -> Any:
        try:
            send = get_object if operation == "get_object" else getattr(client, operation)
            response: Response = await send(**parameters)
        except RuntimeError as error:  # botocore has no class for these errors
            if "Credentials were refreshed" in str(error):
                raise exceptions.CredentialRetrievalError(provider="the AWS chain", error_msg=error) from error
            if "timezone offset" not in str(error):
                raise
            raise MalformedResponseError(f"the response is malformed: {format_reason(error)}") from error
        except PARSER_ERRORS as error:
            raise MalformedResponseError(f"the response is malformed: {format_reason(error)}") from error
        return response if read is None else await read(response)

    bucket = parameters["Bucket"]
    name = f"{operation} s3://{bucket}/{parameters.get('Key', parameters.get('Prefix', ''))}"
    return await with_retries(make_request, lambda: client.list_objects_v2(Bucket=bucket, MaxKeys=1), name)


def to_store_error(error: BaseException, message: str) -> CatsdogsError:
    """Convert the error of a request to a RunError if it is retryable, else to an InputError."""
    return RunError(message) if is_retryable(error) else InputError(message)


def check_credentials(error: BaseException) -> None:
    """Raise RunError if an error says that the S3 credentials are missing, wrong or expired."""
    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    fetching = isinstance(cause, ClientError) and cause.operation_name in CREDENTIAL_REQUESTS
    code = read_error_code(cause)
    if fetching or code in CREDENTIAL_CODES or isinstance(cause, CREDENTIAL_ERRORS):
        raise RunError(
            f"the S3 credentials are missing, wrong or expired ({code or type(cause).__name__}): renew them in the "
            "standard AWS chain (environment, ~/.aws, instance profile) and run again"
        ) from error
