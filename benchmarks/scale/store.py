"""An S3 server on loopback that answers each request late, and hardly needs the CPU.

moto takes several milliseconds of CPU a request, so that it, not the driver, would be measured. This one keeps objects
in memory; it has the requests of `catsdogs.storage`, with their conditions. It checks no signature.

python -m benchmarks.scale.store 0.05 100000      prints its port; 100,000 objects are there
"""

import asyncio
import bisect
import contextlib
import hashlib
import itertools
import subprocess
import sys
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from benchmarks.faults.store import CREDENTIALS
from benchmarks.faults.wire import Head, encode_head, read_body
from benchmarks.scale.generated import path_of

PAGE_KEYS = 1000
STATUSES = {200: "OK", 204: "No Content", 404: "Not Found", 412: "Precondition Failed"}


class LateStore:
    """The server in a separate process; `environment` points a client at it.

    Args:
        num_objects: that are there at the start, with the names of `generated.path_of`.
    """

    def __init__(self, delay_s: float, num_objects: int = 0) -> None:
        self._command = [sys.executable, "-m", "benchmarks.scale.store", str(delay_s), str(num_objects)]

    def __enter__(self) -> Self:
        """Start the server."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}"}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self._process.kill()
        self._process.communicate()


class _Server:
    def __init__(self, delay_s: float, num_objects: int) -> None:
        self._delay_s = delay_s
        self._names = [path_of(i).removeprefix("s3:/") for i in range(num_objects)]  # /bucket/key, sorted
        self._objects = dict.fromkeys(self._names, (b"", "0" * 32))  # content and etag

    async def run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await Head.read(reader)
                if head.get("expect"):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = b"".join([chunk async for chunk in read_body(head, reader, to_the_end=False)])
                await asyncio.sleep(self._delay_s)
                method, target, _ = head.first_line.split(" ", 2)
                status, content, etag = self._respond(method, target, head, body)
                headers = [("ETag", f'"{etag}"')] if etag else []
                headers += [("Content-Length", str(len(content)))] if status != 204 else []
                writer.write(encode_head(f"HTTP/1.1 {status} {STATUSES[status]}", headers))
                writer.write(b"" if method == "HEAD" else content)
                await writer.drain()
        writer.close()

    def _respond(self, method: str, target: str, head: Head, body: bytes) -> tuple[int, bytes, str]:
        """Return the status, the content and the etag."""
        url = urlsplit(target)
        name = unquote(url.path)
        if name.count("/") == 1 or name.endswith("/"):
            return 200, self._list(name.strip("/"), {key: value[0] for key, value in parse_qs(url.query).items()}), ""
        content, etag = self._objects.get(name, (b"", ""))
        if method == "PUT":
            return self._put(name, head, body, etag)
        if method == "DELETE":
            if self._objects.pop(name, None):
                del self._names[bisect.bisect_left(self._names, name)]
            return 204, b"", ""
        return (200, content, etag) if etag else (404, _error("NoSuchKey"), "")

    def _put(self, name: str, head: Head, body: bytes, etag: str) -> tuple[int, bytes, str]:
        expected = head.get("if-match").strip('"')
        if (head.get("if-none-match") and etag) or (expected and expected != etag):
            return (412, _error("PreconditionFailed"), "")
        if name not in self._objects:
            bisect.insort(self._names, name)
        self._objects[name] = body, hashlib.md5(body, usedforsecurity=False).hexdigest()
        return 200, b"", self._objects[name][1]

    def _list(self, bucket: str, query: dict[str, str]) -> bytes:
        """Format a page of a listing; `/` is its only delimiter."""
        prefix, after = query.get("prefix", ""), query.get("continuation-token", query.get("start-after", ""))
        start = f"/{bucket}/{prefix}"
        first = max(bisect.bisect_left(self._names, start), bisect.bisect_right(self._names, f"/{bucket}/{after}"))
        found: list[str] = []
        for name in itertools.islice(self._names, first, None):
            key = prefix + self._group(name[len(start) :], query)
            if not name.startswith(start) or len(found) > PAGE_KEYS:
                break
            if key > after and key not in found[-1:]:
                found.append(key)
        page, rest = found[:PAGE_KEYS], found[PAGE_KEYS:]
        items = [f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>" for key in page if key[-1:] == "/"]
        items += [f"<Contents><Key>{escape(key)}</Key></Contents>" for key in page if key[-1:] != "/"]
        if rest:
            items.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        truncated = f"<IsTruncated>{'true' if rest else 'false'}</IsTruncated>"
        return f"<ListBucketResult>{truncated}{''.join(items)}</ListBucketResult>".encode()

    def _group(self, name: str, query: dict[str, str]) -> str:
        folder, slash, _ = name.partition("/")
        return folder + slash if query.get("delimiter") and slash else name


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


if __name__ == "__main__":
    asyncio.run(_Server(float(sys.argv[1]), int(sys.argv[2])).run())
