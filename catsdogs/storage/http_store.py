"""One request by HTTP: limits of its size and time, checked redirects. Its retries are in `other_stores`.

Requests are made with aiohttp, in the session of fsspec's file system. A redirect leads to http or https, never from
https to http, and never from a public host to an address of this machine, of a private network or of the link: such
addresses have services without authentication, for example the credentials of a cloud's machine.
"""

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import time
import zlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from catsdogs.storage.limits import BODY_TIMEOUT_S, MIN_BODY_BYTES_PER_S, check_length
from catsdogs.storage.retrying import TransientError, is_retryable_status, read_retry_after, transport_errors

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 20.0  # for a connection; for the next bytes of a response
GZIP, GZIP_OR_ZLIB, GZIP_MAGIC = 16 + zlib.MAX_WBITS, 32 + zlib.MAX_WBITS, b"\x1f\x8b"
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are the IPv4 address that is reached
# Python takes them, or some of their addresses, for public: of IPv4 protocols, of IPv4 hosts, of a local NAT64.
NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48")]
PIECE_BYTES = 16 << 10  # unpacked at once: each member of a body copies the rest of its piece


class StoreError(OSError):
    """A store refused a request, and will refuse the same request later."""


class _RefusedRedirectError(Exception):
    """A redirect is not followed. Not an OSError, which aiohttp would take for one of the connection."""


def is_http(uri: str) -> bool:
    """Whether a URI is read by HTTP."""
    return uri.lower().startswith(("http://", "https://"))


def to_status_error(status: int, reason: str, retry_after: str | None) -> OSError:
    """Convert the HTTP status of a failed request."""
    if is_retryable_status(status):
        return TransientError(reason, read_retry_after(retry_after))
    if status in (401, 403):
        return PermissionError(reason)
    return FileNotFoundError(reason) if status in (404, 410) else StoreError(reason)


@contextlib.asynccontextmanager
async def open_url(fs: Any, uri: str) -> "AsyncIterator[aiohttp.ClientResponse]":
    """Request a URL of an fsspec file system; raises OSError unless the response has the content."""
    import aiohttp  # here, because it takes 0.2 s

    session = await fs.set_session()
    options: dict[str, Any] = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S),
        **fs.kwargs,
        "headers": {"Accept-Encoding": "identity"} | dict(fs.kwargs.get("headers") or {}),
        "auto_decompress": False,  # it has no limit
        "middlewares": (_RedirectCheck(),),
    }
    try:
        async with session.get(fs.encode_url(uri), **options) as response:
            if response.status != 200:  # 206 has a part of the content, 204 and 205 none
                reason = f"HTTP {response.status} {http.client.responses.get(response.status, '')}".strip()
                raise to_status_error(response.status, reason, response.headers.get("Retry-After"))
            yield response
    except (aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects) as error:
        raise StoreError("redirected too often, or to another scheme") from error
    except _RefusedRedirectError as error:
        raise StoreError(str(error)) from error


async def read_url(fs: Any, uri: str, limit_bytes: int) -> bytes:
    """Read a URL of an fsspec file system; TooLongError before more than the limit is in memory."""
    async with open_url(fs, uri) as response:
        return await read_body(response, limit_bytes)


async def read_body(response: "aiohttp.ClientResponse", limit_bytes: int) -> bytes:
    """Read the body of a response, unpacked if it is compressed."""
    started_s, num_received = time.monotonic(), 0
    content = bytearray()
    unpacker = _choose_unpacker(response.headers.get("Content-Encoding", ""))
    # What does not compress becomes a little longer. Members without content and padding have no end.
    max_received = limit_bytes + limit_bytes // 100 + 1024 if unpacker else limit_bytes
    check_length(response.content_length or 0, max_received)
    try:
        async for chunk in response.content.iter_any():
            num_received += len(chunk)
            check_length(num_received, max_received)
            if unpacker:
                unpacker.unpack(chunk, content, limit_bytes)
            else:
                content += chunk
            if time.monotonic() - started_s > BODY_TIMEOUT_S + num_received / MIN_BODY_BYTES_PER_S:
                raise TimeoutError("it took too long")
        if unpacker and not unpacker.is_complete:
            raise TransientError("the compressed data are incomplete")
    except zlib.error as error:
        raise TransientError(f"the compressed data are damaged: {error}") from error
    except transport_errors() as error:
        raise TransientError(f"the body broke off after {num_received} bytes: {error}") from error
    return bytes(content)


class _Unpacker:
    """Unpacks a body of one or more gzip members, or of zlib data. Zeros after a member are padding."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(GZIP_OR_ZLIB)

    @property
    def is_complete(self) -> bool:
        return self._stream.eof

    def unpack(self, chunk: bytes, content: bytearray, limit_bytes: int) -> None:
        """Append what the next bytes of a body contain; TooLongError if that is more than the limit."""
        for start in range(0, len(chunk), PIECE_BYTES):
            piece = chunk[start : start + PIECE_BYTES]
            while piece := self._start_member(piece) if self._stream.eof else piece:
                content += self._stream.decompress(piece, limit_bytes - len(content) + 1)
                check_length(len(content), limit_bytes)
                piece = self._stream.unused_data

    def _start_member(self, piece: bytes) -> bytes:
        piece = piece.lstrip(b"\0")
        if not GZIP_MAGIC.startswith(piece[: len(GZIP_MAGIC)]):
            raise StoreError("other data follow the compressed data")
        if piece:
            self._stream = zlib.decompressobj(GZIP)
        return piece


def _choose_unpacker(encoding: str) -> _Unpacker | None:
    """Choose how to unpack a body, None if it is plain; a server may compress it without a request."""
    if encoding.strip().lower() in ("", "identity"):
        return None
    if encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
        return _Unpacker()
    raise StoreError(f"the body has the encoding {encoding[:40]!r}, expected none or gzip")


class _RedirectCheck:
    """A middleware of aiohttp, which calls it for the first URL and for each redirect."""

    def __init__(self) -> None:
        self._previous: URL | None = None

    async def __call__(
        self, request: "aiohttp.ClientRequest", send: "aiohttp.ClientHandlerType"
    ) -> "aiohttp.ClientResponse":
        if self._previous is not None:
            await _check_redirect(self._previous, request.url)
        self._previous = request.url
        return await send(request)


async def _check_redirect(source: "URL", target: "URL") -> None:
    if source.scheme == "https" and target.scheme == "http":
        raise _RefusedRedirectError("redirected from https to http, which is not followed")
    if (source.host, source.port) == (target.host, target.port):
        return
    if await _is_public(source, False) and not await _is_public(target, True):
        reason = f"redirected from a public host to the private address {target.host}, which is not followed"
        raise _RefusedRedirectError(reason)


async def _is_public(url: "URL", all_addresses: bool) -> bool:
    """Whether one address of a host, or each of them, is public; a host that has no address is."""
    loop = asyncio.get_running_loop()
    try:
        addresses = await loop.run_in_executor(None, list_addresses, url.host or "")
    except OSError:  # connecting to it reports the reason
        return True
    return (all if all_addresses else any)(map(_is_public_address, addresses))


def list_addresses(host: str) -> list[str]:
    """Resolve a host name."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _is_public_address(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = embedded or address
    return address.is_global and not any(address in network for network in NOT_PUBLIC)
