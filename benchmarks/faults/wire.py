"""HTTP/1.1 as it travels: heads read and laid out again unchanged, bodies streamed with their framing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

CHUNK_BYTES = 65536


@dataclass
class Head:
    """The first lines of a request or an answer."""

    first_line: str
    headers: list[tuple[str, str]]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "Head":
        """Read up to the empty line."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:-2])
        return cls(lines[0], [(name, value.strip()) for name, _, value in pairs])

    def get(self, name: str) -> str:
        """Find a header; empty where there is none."""
        return next((value for found, value in self.headers if found.lower() == name), "")

    def without(self, *names: str) -> list[tuple[str, str]]:
        """Leave headers out."""
        return [(name, value) for name, value in self.headers if name.lower() not in names]


def encoded(first_line: str, headers: list[tuple[str, str]]) -> bytes:
    """Lay a head out as it travels."""
    return "\r\n".join([first_line, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


async def body_of(head: Head, reader: asyncio.StreamReader, to_the_end: bool) -> AsyncIterator[bytes]:
    """Stream a body as it travels, chunk lengths and all."""
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
        piece = await reader.read(min(left, CHUNK_BYTES))
        if not piece:
            if length:
                raise asyncio.IncompleteReadError(b"", left)
            return
        left -= len(piece)
        yield piece
