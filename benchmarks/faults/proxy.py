"""A reverse proxy in front of an S3 endpoint that injects faults.

    with FaultProxy("http://127.0.0.1:5000") as proxy:
        proxy.faults = [Fault("slow_down", probability=0.1), Fault("reset", kinds={"image"}, first=1, at_byte=100)]
        ...  # a client of proxy.endpoint
        proxy.counts.by_kind["image"], proxy.counts.injected["reset"]

Paths, queries and headers are forwarded unchanged (also Host, which S3 signs), and bodies are streamed. A request gets
the first fault of the list that matches it. Requests are counted by kind: `image` (GET of an image's key), `list`,
`get`, `head`, `put`, `post`, `delete`. Buckets in `bucket_endpoints` are those of another store.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from typing import Self
from urllib.parse import urlsplit

from benchmarks.faults.injection import RESPONSES, Counts, Fault, Request
from benchmarks.faults.wire import Head, encode_head, read_body

__all__ = ["Fault", "FaultProxy"]


class FaultProxy:
    """The proxy; it serves on a thread of its own while its context is open."""

    def __init__(self, upstream: str, port: int = 0, seed: int = 0) -> None:
        self._endpoint = upstream
        self._port = port
        self._rng = random.Random(seed)
        self._connections: set[asyncio.Task[None]] = set()
        self.bucket_endpoints: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.counts = Counts()

    def __enter__(self) -> Self:
        """Listen on loopback."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        """Close every connection."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self._port}"

    def reset(self, *faults: Fault, seed: int = 0) -> None:
        """Replace the faults, and set the counts to zero."""
        self.faults, self.counts, self._rng = list(faults), Counts(), random.Random(seed)

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._respond(Request(await Head.read(reader)), reader, writer):
                pass
        except (
            OSError,
            asyncio.IncompleteReadError,
            asyncio.CancelledError,
        ):  # the client or the store closed, or the proxy stops
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _respond(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Respond to one request; whether the connection stays open."""
        fault = next(
            (f for f in self.faults if f.should_inject(request, self.counts.by_kind["image"], self._rng)), None
        )
        self.counts.by_method[request.method] += 1
        self.counts.by_kind[request.kind] += 1
        if request.kind == "image":
            self.counts.gets_by_key[request.key] += 1
        if fault is not None:
            self.counts.injected[fault.what] += 1
            if fault.what in RESPONSES:
                return await _refuse(fault.what, request, reader, writer)
        upstream = urlsplit(self.bucket_endpoints.get(request.bucket, self._endpoint))
        upstream_reader, upstream_writer = await asyncio.open_connection(upstream.hostname, upstream.port or 80)
        try:
            await _forward(request, fault, reader, writer, upstream_writer)
            return await self._send_back(request, fault, upstream_reader, writer)
        finally:
            upstream_writer.close()

    async def _send_back(
        self, request: Request, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = await Head.read(reader)
        status = int(head.first_line.split(" ")[1])
        has_body = request.method != "HEAD" and status not in (204, 304)
        framed = bool(head.get("content-length") or head.get("transfer-encoding"))
        headers = head.without("connection")
        if fault is not None and fault.what != "replaced" and has_body and status < 300:
            body = b"".join([chunk async for chunk in read_body(head, reader, to_the_end=True)])
            return await _damage(fault, Head(head.first_line, headers), body, writer)
        writer.write(encode_head(head.first_line, headers))
        if has_body:
            async for chunk in read_body(head, reader, to_the_end=True):
                writer.write(chunk)
                await writer.drain()
        await writer.drain()
        return framed or not has_body


async def _forward(
    request: Request,
    fault: Fault | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    upstream: asyncio.StreamWriter,
) -> None:
    """Forward a request over a new connection."""
    first_line = request.first_line
    if fault is not None and fault.what == "replaced":
        first_line = f"{request.method} /{request.bucket}/{fault.instead} HTTP/1.1"
    upstream.write(encode_head(first_line, [*request.without("connection", "expect"), ("Connection", "close")]))
    if request.get("expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    async for chunk in read_body(request, reader, to_the_end=False):
        upstream.write(chunk)
        await upstream.drain()


async def _refuse(what: str, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    status, reason, code, message = RESPONSES[what]
    keep_open = not request.get("expect")  # else it is unknown whether the client sends its body
    if keep_open:
        async for _ in read_body(request, reader, to_the_end=False):
            pass
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    body = b"" if request.method == "HEAD" else text.encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    writer.write(
        encode_head(f"HTTP/1.1 {status} {reason}", headers if keep_open else [*headers, ("Connection", "close")])
    )
    writer.write(body)
    await writer.drain()
    return keep_open


async def _damage(fault: Fault, head: Head, body: bytes, writer: asyncio.StreamWriter) -> bool:
    """Send part of a body, or all of it slowly; whether the connection stays open."""
    part = body[: min(fault.at_byte, max(0, len(body) - 1))]
    if fault.what == "short":
        writer.write(
            encode_head(head.first_line, [*head.without("content-length"), ("Content-Length", str(len(part)))])
        )
    else:
        writer.write(encode_head(head.first_line, head.headers))
    if fault.what == "slow":
        for i in range(len(body)):
            writer.write(body[i : i + 1])
            await writer.drain()
            await asyncio.sleep(1)
        return True
    writer.write(part)
    await writer.drain()
    if fault.what == "reset":
        with contextlib.suppress(OSError):  # without linger, the kernel sends RST
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    return fault.what == "short"
