"""catsdogs.download against real HTTP and HTTPS servers on loopback and hostile zips."""

import errno
import hashlib
import io
import os
import random
import shutil
import ssl
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from catsdogs import download as module
from catsdogs.download import TEMPORARY_PREFIX, download
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.progress import Message, StageProgress, silent

Respond = Callable[[BaseHTTPRequestHandler], None]
PHOTO = random.Random(0).randbytes(5_000)
GOOD_FILES = {
    "cats_and_dogs_filtered/train/cats/cat.0.jpg": PHOTO,
    "cats_and_dogs_filtered/train/dogs/dög (1).jpg": PHOTO * 250,  # more than one chunk
    "cats_and_dogs_filtered/validation/cats/empty.jpg": b"",
    "cats_and_dogs_filtered/vectorize.py": b"print('hello')\n" * 20,
}


class Server(ThreadingHTTPServer):
    """Responds to each path as `responses` says."""

    daemon_threads = True

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses: dict[str, Respond] = {}
        self.scheme = "https" if certificate else "http"
        self.stopping = Event()
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: clients here close connections on purpose."""

    def url(self, path: str, response: Respond | bytes) -> str:
        self.responses[path] = response if callable(response) else body(response)
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.responses[self.path](self)

    def log_message(self, format: str, *args: object) -> None:
        pass


def body(content: bytes, declared_bytes: int | None = -1) -> Respond:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if declared_bytes is not None:
            handler.send_header("Content-Length", str(len(content) if declared_bytes == -1 else declared_bytes))
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def status(code: int, location: str | None = None) -> Respond:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code, "\x1b[31mred")
        handler.send_header("Content-Length", "0")
        if location:
            handler.send_header("Location", location)
        handler.end_headers()

    return respond


def serve(server: Server) -> Iterator[Server]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a self-signed certificate and its key for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(secret + signed.public_bytes(pem))
    return path


@pytest.fixture(scope="module")
def untrusted(certificate: Path) -> Iterator[Server]:
    yield from serve(Server(certificate))


@pytest.fixture
def https(untrusted: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return untrusted


@pytest.fixture(scope="module")
def http() -> Iterator[Server]:
    yield from serve(Server())


@pytest.fixture(autouse=True)
def _no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def make_zip(files: dict[str, bytes] | list[tuple[ZipInfo, bytes]], method: int = ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with ZipFile(content, "w", method) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data, method)
    return content.getvalue()


GOOD_ZIP = make_zip(GOOD_FILES)


def make_entry(name: str, mode: int) -> ZipInfo:
    info = ZipInfo(name)
    info.external_attr = mode << 16
    return info


def set_field(content: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite a field of the last entry of the zip's directory (APPNOTE 4.3.12)."""
    start = content.rindex(b"PK\x01\x02") + offset
    return content[:start] + value + content[start + len(value) :]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expect_failure(url: str, output: Path, kind: type[CatsdogsError] = InputError) -> str:
    """Expect the download to fail with one printable line and to leave no files; return the line."""
    before = read_files(output.parent)
    with pytest.raises(kind) as caught:
        download(url, output, silent)
    assert read_files(output.parent) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


# Downloads that succeed


def test_unpacks_a_zip_and_returns_the_folder_with_train(https: Server, tmp_path: Path) -> None:
    events: list[object] = []
    folder = download(https.url("/good.zip", GOOD_ZIP), tmp_path / "new" / "data", events.append)
    assert folder == tmp_path / "new" / "data" / "cats_and_dogs_filtered"
    assert read_files(tmp_path / "new" / "data") == GOOD_FILES
    assert StageProgress("download", len(GOOD_ZIP), len(GOOD_ZIP)) in events
    assert Message(f"sha256 of the zip: {hashlib.sha256(GOOD_ZIP).hexdigest()}") in events
    assert events[-1] == StageProgress("unpack", 4, 4)
    assert os.listdir(tmp_path / "new") == ["data"]


def test_returns_the_output_if_train_is_directly_in_it(http: Server, tmp_path: Path) -> None:
    url = http.url("/flat.zip", make_zip({"train/cats/a.jpg": PHOTO, "train/dogs/b.jpg": PHOTO}))
    assert download(url, tmp_path / "data", silent) == tmp_path / "data"


def test_fills_an_empty_folder_without_replacing_it(http: Server, tmp_path: Path, monkeypatch) -> None:
    inode = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    url = http.url("/good.zip", make_zip({**GOOD_FILES, "README": b"read me"}))
    assert download(url, Path(), silent) == Path("cats_and_dogs_filtered")
    assert sorted(os.listdir()) == ["README", "cats_and_dogs_filtered"]
    assert tmp_path.stat().st_ino == inode


@pytest.mark.parametrize("is_inside", [True, False])
def test_ignores_the_temporary_folder_of_a_killed_run(http: Server, tmp_path: Path, is_inside: bool) -> None:
    output = tmp_path / "data"
    leftover = (output if is_inside else tmp_path) / f"{TEMPORARY_PREFIX}killed" / "download.zip"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"PK")
    assert len(read_files(download(http.url("/good.zip", GOOD_ZIP), output, silent))) == 4


def test_follows_a_symlink_to_an_empty_folder(http: Server, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    download(http.url("/good.zip", GOOD_ZIP), tmp_path / "data", silent)
    assert read_files(tmp_path / "disk") == GOOD_FILES


@pytest.mark.parametrize("method", [ZIP_STORED, ZIP_DEFLATED])
def test_accepts_a_response_without_a_length(http: Server, tmp_path: Path, method: int) -> None:
    download(http.url("/unsized.zip", body(make_zip(GOOD_FILES, method), None)), tmp_path / "data", silent)
    assert read_files(tmp_path / "data") == GOOD_FILES


@pytest.mark.parametrize("name", ["train/" + "a" * 255, "train/C:.jpg", "..a/b..", "日本/\u3000猫.jpg", " "])
def test_accepts_unusual_but_harmless_names(http: Server, tmp_path: Path, name: str) -> None:
    download(http.url("/odd.zip", make_zip({name: PHOTO})), tmp_path / "data", silent)
    assert read_files(tmp_path / "data") == {name: PHOTO}


def test_ignores_the_permissions_in_the_zip(http: Server, tmp_path: Path) -> None:
    url = http.url("/setuid.zip", make_zip([(make_entry("train/a.jpg", stat.S_IFREG | 0o6777), PHOTO)]))
    download(url, tmp_path / "data", silent)
    assert not (tmp_path / "data/train/a.jpg").stat().st_mode & 0o6111


# URLs, redirects and the network


def test_follows_redirects_to_https(https: Server, http: Server, tmp_path: Path) -> None:
    good = https.url("/good.zip", GOOD_ZIP)
    for number, url in enumerate([https.url("/moved", status(302, good)), http.url("/up", status(308, good))]):
        download(url, tmp_path / str(number), silent)
        assert read_files(tmp_path / str(number)) == GOOD_FILES


@pytest.mark.parametrize("target", ["http://example.com/a.zip", "ftp://example.com/a.zip", "file:///etc/passwd"])
def test_refuses_redirects_that_leave_https(https: Server, http: Server, tmp_path: Path, target: str) -> None:
    for server in (https, http):
        expect_failure(server.url("/moved", status(302, target)), tmp_path / "data")


def test_refuses_a_redirect_from_https_to_http_on_loopback(https: Server, http: Server, tmp_path: Path) -> None:
    message = expect_failure(https.url("/moved", status(302, http.url("/good.zip", GOOD_ZIP))), tmp_path / "data")
    assert "redirects to" in message
    assert "expected https" in message


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.com/a.zip", "http://127.0.0.1.example.com/a.zip", "ftp://127.0.0.1/a.zip"),
        *("file:///etc/passwd", "/etc/passwd", "", "https://", "https:///a.zip", "https://[::1/a.zip"),
        *("https://host:port/a.zip", "https://host/a b.zip", "https://host/ä.zip", "https://host/\x1b[31m.zip"),
    ],
)
def test_refuses_urls_that_are_not_https(tmp_path: Path, url: str) -> None:
    assert "expected https://" in expect_failure(url, tmp_path / "data")


def test_messages_contain_no_secret_of_a_url(http: Server, tmp_path: Path) -> None:
    assert "hunter2" not in expect_failure("https://me:hunter2@host/a.zip", tmp_path / "data")
    url = http.url("/a.zip?signature=hunter2", status(403))
    assert "hunter2" not in expect_failure(url, tmp_path / "data")


@pytest.mark.parametrize(("code", "kind"), [(404, InputError), (403, InputError), (429, RunError), (503, RunError)])
def test_reports_an_error_status(http: Server, tmp_path: Path, code: int, kind: type[CatsdogsError]) -> None:
    assert f"answered {code}" in expect_failure(http.url("/gone.zip", status(code)), tmp_path / "data", kind)


def test_reports_an_untrusted_certificate(untrusted: Server, tmp_path: Path) -> None:
    message = expect_failure(untrusted.url("/good.zip", GOOD_ZIP), tmp_path / "data", RunError)
    assert "self-signed certificate" in message
    assert "SSL_CERT_FILE" in message


def test_reports_a_refused_connection(tmp_path: Path) -> None:
    assert "refused" in expect_failure("http://127.0.0.1:9/a.zip", tmp_path / "data", RunError)


def test_reports_an_unknown_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "nowhere.invalid" in expect_failure("https://nowhere.invalid/a.zip", tmp_path / "data", RunError)


def test_reports_a_server_that_stalls(http: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        body(b"PK", 100)(handler)
        http.stopping.wait(5)

    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    assert "timed out" in expect_failure(http.url("/slow.zip", respond), tmp_path / "data", RunError)


def test_reports_a_response_that_is_not_http(http: Server, tmp_path: Path) -> None:
    url = http.url("/odd.zip", lambda handler: handler.wfile.write(b"\x1b[31mhello\r\n") and None)
    expect_failure(url, tmp_path / "data", RunError)


def test_reports_a_body_that_ends_early(http: Server, tmp_path: Path) -> None:
    url = http.url("/short.zip", body(GOOD_ZIP[:-100], len(GOOD_ZIP)))
    assert f"of {len(GOOD_ZIP)} bytes" in expect_failure(url, tmp_path / "data", RunError)


@pytest.mark.parametrize("declared_bytes", [-1, None])
def test_limits_the_size_of_the_download(http: Server, tmp_path: Path, monkeypatch, declared_bytes) -> None:
    monkeypatch.setattr(module, "MAX_DOWNLOAD_BYTES", len(GOOD_ZIP) - 1)
    url = http.url("/large.zip", body(GOOD_ZIP, declared_bytes))
    assert f"at most {len(GOOD_ZIP) - 1:,}" in expect_failure(url, tmp_path / "data")


# The output


@pytest.mark.parametrize("name", ["photo.jpg", ".hidden"])
def test_refuses_an_output_that_is_not_empty(http: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(PHOTO)
    assert "is not empty" in expect_failure(http.url("/good.zip", GOOD_ZIP), tmp_path / "data")


@pytest.mark.parametrize(("below", "reason"), [(".", "File exists"), ("below", "Not a directory")])
def test_refuses_a_file_as_output(http: Server, tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "data").write_bytes(PHOTO)
    assert reason in expect_failure(http.url("/good.zip", GOOD_ZIP), tmp_path / "data" / below)


def test_keeps_files_that_appear_during_the_download(http: Server, tmp_path: Path) -> None:
    output = tmp_path / "data"

    def progress(_: object) -> None:
        (output / "theirs").write_bytes(b"theirs")

    with pytest.raises(InputError, match="not empty"):
        download(http.url("/good.zip", GOOD_ZIP), output, progress)
    assert read_files(output) == {"theirs": b"theirs"}


@pytest.mark.parametrize("stage", ["download", "unpack"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(), SystemExit),
        (OSError(errno.ENOSPC, "No space left"), RunError),
        (OSError(errno.EROFS, "Read-only file system"), InputError),
    ],
    ids=["ctrl-c", "sigterm", "full", "read-only"],
)
def test_leaves_an_empty_folder_after_an_interrupt_or_a_disk_error(
    http: Server, tmp_path: Path, stage: str, error: BaseException, expected: type[BaseException]
) -> None:
    output = tmp_path / "data"

    def progress(event: object) -> None:
        if isinstance(event, StageProgress) and event.stage == stage:
            assert len(read_files(tmp_path)) > 0
            raise error

    with pytest.raises(expected):
        download(http.url("/good.zip", GOOD_ZIP), output, progress)
    assert list(tmp_path.rglob("*")) == [output]


# Hostile and damaged zips


@pytest.mark.parametrize("name", ["../evil", "train/../../evil", "..", "train/..", "/etc/evil", "//host/evil", "/"])
def test_refuses_a_name_that_leaves_the_folder(http: Server, tmp_path: Path, name: str) -> None:
    message = expect_failure(http.url("/unsafe.zip", make_zip({"train/a.jpg": PHOTO, name: b""})), tmp_path / "data")
    assert f"zip entry {name[:200]!r}" in message
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["c:evil", "train\\..\\..\\evil", "./train//a", "train/\x1b[31mred\n.jpg"])
def test_unpacks_strange_names_into_the_folder(http: Server, tmp_path: Path, name: str) -> None:
    download(http.url("/strange.zip", make_zip({name: PHOTO})), tmp_path / "data", silent)
    assert list(read_files(tmp_path / "data").values()) == [PHOTO]
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("name", ["train/" + "a" * 256, "train/" + "ä" * 128])
def test_refuses_a_name_that_is_too_long(http: Server, tmp_path: Path, name: str) -> None:
    assert "name too long" in expect_failure(http.url("/long.zip", make_zip({name: PHOTO})), tmp_path / "data")


def make_lying(content: bytes, **fields: int) -> bytes:
    """Change sizes that the directory declares for the last entry (APPNOTE 4.3.12)."""
    offsets = {"crc": 16, "packed": 20, "unpacked": 24, "header": 42}
    for name, value in fields.items():
        content = set_field(content, offsets[name], struct.pack("<I", value))
    return content


BOMB = make_zip({"train/bomb": bytes(5_000_000)})
PHOTO_ZIP = make_zip({"train/a.jpg": PHOTO})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *(
            (make_zip([(make_entry("train/link", kind | 0o777), b"/etc/passwd")]), "link or special file")
            for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
        ),
        (set_field(make_zip({"a": PHOTO}), 28, struct.pack("<HH", 0, 1)), "no name"),
        (make_zip({"train/a": PHOTO, "train/a/b.jpg": PHOTO}), "--output"),
        (make_zip({"train/a/b.jpg": PHOTO, "train/a": PHOTO}), "--output"),
        *((set_field(PHOTO_ZIP, 8, struct.pack("<H", flag)), "encrypt") for flag in (0x1, 0x40)),
        (make_zip({"train/a.jpg": PHOTO}, ZIP_BZIP2), "neither stored nor deflated"),
        (make_lying(BOMB, unpacked=1000), "Bad CRC-32"),
        (make_lying(BOMB, packed=1 << 20), "not a valid zip"),
        (make_lying(PHOTO_ZIP, unpacked=len(PHOTO) - 1), "Bad CRC-32"),
        (make_lying(PHOTO_ZIP, header=1 << 31), "not a valid zip"),
        (make_zip({"train/a.jpg": PHOTO}, ZIP_STORED).replace(PHOTO[:8], bytes(8)), "Bad CRC-32"),
        (b"", "not a valid zip"),
        (b"<html>log in</html>", "not a valid zip"),
        (b"PK\x03\x04", "not a valid zip"),
        (GOOD_ZIP[:-30], "not a valid zip"),
        (GOOD_ZIP[:1000], "not a valid zip"),
    ],
)
def test_refuses_a_hostile_or_damaged_zip(http: Server, tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in expect_failure(http.url("/bad.zip", content), tmp_path / "data")


def test_never_writes_more_than_an_entry_declares(http: Server, tmp_path: Path) -> None:
    lying = make_lying(BOMB, unpacked=1000, crc=zlib.crc32(bytes(1000)))
    download(http.url("/liar.zip", lying), tmp_path / "data", silent)
    assert read_files(tmp_path / "data") == {"train/bomb": bytes(1000)}


@pytest.mark.parametrize(
    ("constant", "limit"),
    [("MAX_ENTRIES", 3), ("MAX_UNPACKED_BYTES", 1_250_000)],
)
def test_limits_the_zip(http: Server, tmp_path: Path, monkeypatch, constant: str, limit: int) -> None:
    monkeypatch.setattr(module, constant, limit)
    assert f"at most {limit:,}" in expect_failure(http.url("/good.zip", GOOD_ZIP), tmp_path / "data")


def test_random_damage_is_an_input_error_or_harmless(http: Server, tmp_path: Path) -> None:
    rng = random.Random(0)
    valid = make_zip({"train/a.jpg": PHOTO[:60], "train/dogs/b.jpg": b"b" * 90, "train/c.jpg": b""})
    for _ in range(200):
        damaged = bytearray(valid)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        with suppress(InputError):
            download(http.url("/fuzz.zip", bytes(damaged)), tmp_path / "data", silent)
        assert {path.name for path in tmp_path.iterdir()} <= {"data"}
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
