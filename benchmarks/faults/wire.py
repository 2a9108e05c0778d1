"""HTTP/1.1 on the wire: heads are parsed and encoded unchanged, bodies streamed with their framing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

CHUNK_BYTES = 65536


@dataclass
class Head:
    """The first line and the headers of a request or a response."""

    first_line: str
    headers: list[tuple[str, str]]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "Head":
        """Read a head, up to the empty line."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:-2])
        return cls(lines[0], [(name, value.strip()) for name, _, value in pairs])

    def get(self, name: str) -> str:
        """Return the value of a header; empty if it is missing."""
        return next((value for found, value in self.headers if found.lower() == name), "")

    def without(self, *names: str) -> list[tuple[str, str]]:
        """Return the headers without some."""
        return [(name, value) for name, value in self.headers if name.lower() not in names]


def encode_head(first_line: str, headers: list[tuple[str, str]]) -> bytes:
    """Encode a head for the wire."""
    return "\r\n".join([first_line, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


async def read_body(head: Head, reader: asyncio.StreamReader, to_the_end: bool) -> AsyncIterator[bytes]:
    """Stream a body with its chunk lengths; `to_the_end` where no header gives its length."""
    if "chunked" in head.get("transfer-encoding").lower():
        size = -1
        while size != 0:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + (await reader.readexactly(size + 2) if size else b"")
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            yield line
        yield line
        return
    length = head.get("content-length")
    left = int(length) if length else (2**62 if to_the_end else 0)
    while left:
        chunk = await reader.read(min(left, CHUNK_BYTES))
        if not chunk:
            if length:
                raise asyncio.IncompleteReadError(b"", left)
            return
        left -= len(chunk)
        yield chunk
