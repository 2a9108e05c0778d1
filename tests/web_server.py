"""A web server on loopback whose responses a test chooses; it counts the requests."""

import contextlib
import datetime
import http.server
import ssl
import tempfile
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
def serve(tls: bool = False) -> Iterator[WebServer]:
    """Serve until the context is left; with TLS, the certificate is made for it."""

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
    if tls:
        server.socket = _make_tls_context().wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    started = WebServer(f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}")
    thread.start()
    try:
        yield started
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _make_tls_context() -> ssl.SSLContext:
    """Make a key and a certificate that it signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        file.write(certificate.public_bytes(pem))
        file.flush()
        context.load_cert_chain(file.name)
    return context
