"""CPU time of the GET of a small S3 object, by client.

python -m benchmarks.scale.s3_reads

A server in a separate process answers every GET with 40 kB. Each client reads in a separate process, 32 objects at
a time, three times in turn with the others. The CPU time is that of the process, all threads; images/s are those of a
core that does nothing else. obstore is measured if it is installed.
"""

import argparse
import asyncio
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

from benchmarks.machine import describe_machine

BUCKET, ETAG, BODY_BYTES = "bucket", "0123456789abcdef0123456789abcdef", 40_000
NUM_READS, NUM_WARM, CONCURRENCY, ROUNDS = 4000, 200, 32, 3
HEADERS = {  # as S3 sends them
    "Date": "Fri, 27 Nov 2026 03:00:00 GMT",
    "Last-Modified": "Thu, 26 Nov 2026 03:00:00 GMT",
    "ETag": f'"{ETAG}"',
    "x-amz-request-id": "0123456789ABCDEF",
    "x-amz-server-side-encryption": "AES256",
    "Accept-Ranges": "bytes",
    "Content-Type": "image/jpeg",
    "Content-Length": str(BODY_BYTES),
}
Run = Callable[[list[str]], int]  # reads keys, and returns how many bytes it read


class Responder(asyncio.Protocol):
    """Answers every request with the same object."""

    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    response = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + bytes(BODY_BYTES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Respond to each complete request; a HEAD has no body."""
        *requests, self._received = (self._received + data).split(b"\r\n\r\n")
        for request in requests:
            self._transport.write(self.response[:-BODY_BYTES] if request.startswith(b"HEAD") else self.response)


async def serve() -> None:
    """Print the port, and serve."""
    server = await asyncio.get_running_loop().create_server(Responder, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def open_catsdogs() -> Run:
    """`score` and `train` read like this."""
    from catsdogs import storage

    def read(keys: list[str]) -> int:
        entries = [storage.Entry(f"s3://{BUCKET}/{key}", BODY_BYTES, ETAG) for key in keys]
        groups = [entries[i : i + 256] for i in range(0, len(entries), 256)]
        return sum(len(file.content or b"") for files in storage.fetch_ahead(groups) for file in files)

    return read


def open_aiobotocore() -> Run:
    """The client that s3fs creates, with the settings of catsdogs."""
    import fsspec

    from catsdogs.storage.event_loop import run_sync
    from catsdogs.storage.s3 import S3_OPTIONS

    async def read_all(keys: Iterator[str]) -> int:
        client = await fsspec.filesystem("s3", **S3_OPTIONS).set_session()

        async def read_some() -> int:
            num_bytes = 0
            for key in keys:
                response = await client.get_object(Bucket=BUCKET, Key=key)
                async with response["Body"] as body:
                    num_bytes += len(await body.read())
            return num_bytes

        return sum(await asyncio.gather(*(read_some() for _ in range(CONCURRENCY))))

    return lambda keys: run_sync(read_all, iter(keys))


def in_threads(read_one: Callable[[str], int]) -> Run:
    """Read in as many threads as others have requests in flight."""
    pool = ThreadPoolExecutor(CONCURRENCY)
    return lambda keys: sum(pool.map(read_one, keys))


def open_botocore() -> Run:
    """The synchronous client."""
    from botocore.session import Session

    client = Session().create_client("s3")
    return in_threads(lambda key: len(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()))


def open_pyarrow() -> Run:
    """The file system of pyarrow: a HEAD and a GET."""
    from pyarrow.fs import S3FileSystem

    scheme, _, host = os.environ["AWS_ENDPOINT_URL_S3"].partition("://")
    fs = S3FileSystem(endpoint_override=host, scheme=scheme)

    def read_one(key: str) -> int:
        with fs.open_input_file(f"{BUCKET}/{key}") as file:
            return len(file.read())

    return in_threads(read_one)


def open_obstore() -> Run:
    """The package over Rust's object_store."""
    from obstore.store import S3Store  # type: ignore[import-not-found,unused-ignore]

    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    store = S3Store(BUCKET, endpoint=endpoint, virtual_hosted_style_request=False, client_options={"allow_http": True})
    return in_threads(lambda key: len(bytes(store.get(key).bytes())))


CLIENTS: dict[str, Callable[[], Run]] = {
    "catsdogs": open_catsdogs,
    "aiobotocore": open_aiobotocore,
    "botocore": open_botocore,
    "pyarrow": open_pyarrow,
    "obstore": open_obstore,
}


def measure(name: str) -> None:
    """Print the CPU milliseconds of a GET."""
    read = CLIENTS[name]()
    keys = [f"photos/{i:09d}.jpg" for i in range(NUM_READS)]
    assert read(keys[:NUM_WARM]) == NUM_WARM * BODY_BYTES
    started_s = time.process_time()
    assert read(keys) == NUM_READS * BODY_BYTES
    print((time.process_time() - started_s) / NUM_READS * 1000)


@contextmanager
def run_server() -> Iterator[str]:
    """Run the server; yield its endpoint."""
    process = subprocess.Popen([sys.executable, "-m", __spec__.name, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure every client in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.s3_reads", description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help="in this process; AWS_ENDPOINT_URL_S3 is the server")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
    if options.client:
        measure(options.client)
        return
    names = [name for name in CLIENTS if importlib.util.find_spec(name)]
    found: dict[str, list[float]] = {name: [] for name in names}
    with run_server() as endpoint:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        for name in names * ROUNDS:
            command = [sys.executable, "-m", __spec__.name, "--client", name]
            environment = os.environ | keys | {"AWS_ENDPOINT_URL_S3": endpoint}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(float(done.stdout))
    print(describe_machine(names))
    for name, values in found.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(
            f"{name:12} {median(values):.3f} ms of CPU a GET ({spread}), {1000 / median(values):,.0f} images/s a core"
        )


if __name__ == "__main__":
    main()
