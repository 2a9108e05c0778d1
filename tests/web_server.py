"""A web server on loopback whose responses a test chooses; it counts the requests."""

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        headers: one without a value is not sent.
        num_sent: bytes of the body that are sent before the connection closes; all of them by default.
        closes: the connection is closed without a response.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    num_sent: int | None = None
    closes: bool = False


class WebServer:
    """Serves `responses[path]` in turn; the last one repeats. A path without responses is not found."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.responses: dict[str, list[Response]] = {}
        self.requests: Counter[str] = Counter()

    def add(self, name: str, *responses: Response) -> str:
        """Set the responses of a name; return its URL."""
        self.responses[f"/{name}"] = list(responses)
        return f"{self.url}/{name}"

    def respond(self, path: str) -> Response:
        """Choose the response of a request, and count it."""
        self.requests[path.lstrip("/")] += 1
        responses = self.responses.get(path, [Response(404)])
        return responses[min(self.requests[path.lstrip("/")], len(responses)) - 1]


@contextlib.contextmanager
def serve() -> Iterator[WebServer]:
    """Serve until the context is left."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            response = started.respond(self.path)
            if response.closes:
                return
            self.send_response(response.status)
            headers = {"Content-Length": str(len(response.body))} | dict(response.headers)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.body[: response.num_sent])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    started = WebServer(f"http://127.0.0.1:{server.server_port}")
    thread.start()
    try:
        yield started
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
