"""GETs of S3 objects by the signer and an HTTP session of the S3 client's packages, without the layers between them.

The first GET of a bucket goes through the client, whose events show where it is sent and how it is signed. The next
ones are sent and signed likewise. Credentials and their refresh, errors and checksums are those of the client; so are
redirects to another region, and buckets that are signed in another way.

The signer and the HTTP session are not documented for use without the client.
- Gain: 0.44 ms of CPU a GET instead of 1.16 (docs/clusters.md).
- Fallback: if they have changed, GETs go through the client, and one line is logged.
- Switch: CATSDOGS_PLAIN_S3=1 sends every GET through the client.
- Delete this module once a GET through the client makes less than twice as many calls; a test fails then.
"""

import os
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

from aiobotocore.httpchecksum import AioStreamingChecksumBody
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.response import AioStreamingBody
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.httpchecksum import Crc32Checksum, Sha1Checksum, Sha256Checksum
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies

from catsdogs.storage.s3 import Response, log_incompatible, read_error_code

PLAIN_S3_VARIABLE = "CATSDOGS_PLAIN_S3"
INCOMPATIBLE_ERRORS = (ImportError, AttributeError, TypeError, LookupError)
SIGNATURE = "s3v4"
TARGET = "catsdogs.target"  # in the context of a request of the client
COPIED_HEADERS = ("User-Agent", "x-amz-checksum-mode")
# The address or the region of the signature is not that of the bucket.
REDIRECTS = {
    *("301", "302", "307", "PermanentRedirect", "TemporaryRedirect"),
    *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
}
CHECKSUMS = {
    "x-amz-checksum-crc32": Crc32Checksum,
    "x-amz-checksum-sha1": Sha1Checksum,
    "x-amz-checksum-sha256": Sha256Checksum,
}


@dataclass(frozen=True)
class Route:
    """How the objects of a bucket are requested."""

    url: str  # without the key
    headers: dict[str, str]
    signer: Any
    signing_name: str
    region: str

    async def sign(self, key: str) -> AWSPreparedRequest:
        """Build the GET of a key, signed with the credentials of the moment."""
        request = AWSRequest("GET", self.url + _quote(key), self.headers, stream_output=True)
        auth = await self.signer.get_auth_instance(self.signing_name, self.region, SIGNATURE)
        auth.add_auth(request)
        return request.prepare()


class ObjectGets:
    """GETs like those of an S3 client; they are made in the event loop in which they were opened."""

    def __init__(self, client: Any, http: AIOHTTPSession) -> None:
        self._client = client
        self._http = http
        self._routes: dict[str, Route] = {}
        self._works = os.environ.get(PLAIN_S3_VARIABLE, "") in ("", "0")
        client.meta.events.register("provide-client-params.s3.GetObject", _note_target)
        client.meta.events.register("before-sign.s3.GetObject", self._learn_route)

    @classmethod
    async def open(cls, client: Any, session: Any) -> Self:
        """Open an HTTP session beside that of the client, which the session of aiobotocore made."""
        return cls(client, await _build_http_session(client, session).__aenter__())

    async def get_object(self, Bucket: str, Key: str) -> Response:
        """Request an object, as the client does; a response has those fields only that describe the content."""
        response = await self._send(Bucket, Key)
        if response is not None:
            if response.status_code < 300:
                return _parse(response)
            error = await self._build_error(response)
            if read_error_code(error) not in REDIRECTS:
                raise error
            self._routes.pop(Bucket, None)
        found: Response = await self._client.get_object(Bucket=Bucket, Key=Key)
        return found

    async def _send(self, bucket: str, key: str) -> Any:
        """Send the request of a bucket whose route is known; return None if it must go through the client."""
        route = self._routes.get(bucket)
        if route is None or not key:
            return None
        try:
            request = await route.sign(key)
        except INCOMPATIBLE_ERRORS as error:
            self._switch_off(error)
            return None
        return await self._http.send(request)

    def _switch_off(self, error: Exception) -> None:
        if self._works:
            log_incompatible(error)
        self._works = False
        self._routes.clear()

    async def _build_error(self, response: Any) -> Exception:
        content = {"headers": response.headers, "status_code": response.status_code, "body": await response.content}
        shape = self._client.meta.service_model.operation_model("GetObject").output_shape
        parsed = create_parser("rest-xml").parse(content, shape)
        parsed["ResponseMetadata"] |= {"MaxAttemptsReached": True, "RetryAttempts": 0}  # part of the client's message
        error: Exception = self._client.exceptions.from_code(parsed["Error"].get("Code"))(parsed, "GetObject")
        return error

    def _learn_route(self, **signed: Any) -> None:
        if not self._works:
            return
        try:
            self._add_route(**signed)
        except INCOMPATIBLE_ERRORS as error:
            self._switch_off(error)

    def _add_route(self, request: AWSRequest, signature_version: str, request_signer: Any, **signed: Any) -> None:
        bucket, key = request.context[TARGET]
        if signature_version != SIGNATURE or request.params or not request.url.endswith("/" + _quote(key)):
            return
        signing = request.context.get("signing", {})
        self._routes[bucket] = Route(
            url=request.url.removesuffix(_quote(key)),
            headers={name: request.headers[name] for name in COPIED_HEADERS if name in request.headers},
            signer=request_signer,
            signing_name=signing.get("signing_name", signed["signing_name"]),
            region=signing.get("region", signed["region_name"]),
        )


def _note_target(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    context[TARGET] = params["Bucket"], params["Key"]


def _quote(key: str) -> str:
    return quote(key, safe="/~")


def _build_http_session(client: Any, session: Any) -> AIOHTTPSession:
    """Build a session with the settings of the client's."""
    config = client.meta.config
    return AIOHTTPSession(
        verify=session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE", True),
        proxies=config.proxies or get_environ_proxies(client.meta.endpoint_url),
        timeout=(config.connect_timeout, config.read_timeout),
        max_pool_connections=config.max_pool_connections,
        client_cert=config.client_cert,
        proxies_config=config.proxies_config,
    )


def _parse(response: Any) -> Response:
    length = response.headers.get("content-length")
    return {
        "Body": _build_body(response, length),
        "ContentLength": None if length is None else int(length),
        "ETag": response.headers.get("etag"),
        "ServerSideEncryption": response.headers.get("x-amz-server-side-encryption"),
        "SSECustomerAlgorithm": response.headers.get("x-amz-server-side-encryption-customer-algorithm"),
    }


def _build_body(response: Any, length: str | None) -> Any:
    """Build the body that the client builds; it is checked if the store sends a checksum."""
    for name, checksum in CHECKSUMS.items():
        expected = response.headers.get(name, "-")
        if "-" not in expected:  # one of the parts of an upload has a dash
            return AioStreamingChecksumBody(response.raw, length, checksum(), expected)
    return AioStreamingBody(response.raw, length)
