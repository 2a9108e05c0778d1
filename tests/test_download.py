"""catsdogs.download against a real HTTPS server on this machine and zips made to hurt."""

import errno
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

Answer = Callable[[BaseHTTPRequestHandler], None]
PHOTO = random.Random(0).randbytes(5_000)
GOOD_FILES = {
    "cats_and_dogs_filtered/train/cats/cat.0.jpg": PHOTO,
    "cats_and_dogs_filtered/train/dogs/dög (1).jpg": PHOTO * 250,  # more than one chunk
    "cats_and_dogs_filtered/validation/cats/empty.jpg": b"",
    "cats_and_dogs_filtered/vectorize.py": b"print('hello')\n" * 20,
}


class Server(ThreadingHTTPServer):
    """Answers each path as `answers` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.scheme = "http"
        self.stalled = Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: clients here hang up on purpose."""

    def url(self, path: str, answer: Answer | bytes) -> str:
        self.answers[path] = answer if callable(answer) else whole(answer)
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.answers[self.path](self)

    def log_message(self, format: str, *args: object) -> None:
        pass


def whole(body: bytes, declared_bytes: int | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) if declared_bytes is None else declared_bytes))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def unsized(body: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def status(code: int, location: str | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code, "\x1b[31mred")
        handler.send_header("Content-Length", "0")
        if location:
            handler.send_header("Location", location)
        handler.end_headers()

    return answer


def serve(server: Server) -> Iterator[Server]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stalled.set()
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
def https_server(certificate: Path) -> Iterator[Server]:
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.scheme = "https"
    yield from serve(server)


@pytest.fixture
def https(https_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return https_server


@pytest.fixture(scope="module")
def http() -> Iterator[Server]:
    yield from serve(Server())


def zip_of(files: dict[str, bytes] | list[tuple[ZipInfo, bytes]], method: int = ZIP_DEFLATED) -> bytes:
    body = io.BytesIO()
    with ZipFile(body, "w", method) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content, method)
    return body.getvalue()


GOOD_ZIP = zip_of(GOOD_FILES)


def silent(stage: str, done: int, total: int | None) -> None:
    pass


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def failure(url: str, output: Path, kind: type[CatsdogsError] = InputError) -> str:
    """Expect the download to fail in one printable line and to leave nothing; return the line."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        download(url, output, silent)
    assert sorted(output.parent.rglob("*")) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


def patched(body: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in body
    return body.replace(old, new)


def with_field(body: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite a field of the first entry of the zip's directory (APPNOTE 4.3.12)."""
    start = body.index(b"PK\x01\x02") + offset
    return body[:start] + value + body[start + len(value) :]


def test_unpacks_a_zip_and_returns_the_folder_that_holds_train(https: Server, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    body = GOOD_ZIP
    url = https.url("/good.zip", body)
    folder = download(url, tmp_path / "new" / "data", lambda *step: steps.append(step))
    assert folder == tmp_path / "new" / "data" / "cats_and_dogs_filtered"
    assert content_of(tmp_path / "new" / "data") == GOOD_FILES
    assert ("download", len(body), len(body)) in steps
    assert steps[-1] == ("unpack", 4, 4)
    assert os.listdir(tmp_path / "new") == ["data"]
    assert stat.S_IMODE((tmp_path / "new" / "data").stat().st_mode) == stat.S_IMODE(folder.stat().st_mode)


def test_returns_the_output_where_train_lies_directly_in_it(https: Server, tmp_path: Path) -> None:
    url = https.url("/flat.zip", zip_of({"train/cats/a.jpg": PHOTO, "train/dogs/b.jpg": PHOTO}))
    assert download(url, tmp_path / "data", silent) == tmp_path / "data"


def test_fills_an_empty_folder_in_place(https: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    url = https.url("/good.zip", zip_of({**GOOD_FILES, "README": b"read me"}))
    assert download(url, Path(), silent) == Path("cats_and_dogs_filtered")
    assert sorted(os.listdir()) == ["README", "cats_and_dogs_filtered"]
    assert tmp_path.stat().st_ino == inode


@pytest.mark.parametrize("is_inside", [True, False])
def test_ignores_what_a_killed_run_left_behind(https: Server, tmp_path: Path, is_inside: bool) -> None:
    output = tmp_path / "data"
    leftover = (output if is_inside else tmp_path) / f"{TEMPORARY_PREFIX}killed" / "download.zip"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"PK")
    folder = download(https.url("/good.zip", GOOD_ZIP), output, silent)
    assert len(content_of(folder)) == 4


def test_follows_a_symlink_to_an_empty_folder(https: Server, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    download(https.url("/good.zip", GOOD_ZIP), tmp_path / "data", silent)
    assert content_of(tmp_path / "disk") == GOOD_FILES


def test_leaves_out_what_macos_adds(https: Server, tmp_path: Path) -> None:
    added = {"__MACOSX/train/._a.jpg": b"x", "train/.DS_Store": b"x", "train/__MACOSX/b": b"x"}
    url = https.url("/mac.zip", zip_of({"train/a.jpg": PHOTO, **added, "train/cats/": b""}))
    assert content_of(download(url, tmp_path / "data", silent)) == {"train/a.jpg": PHOTO}


@pytest.mark.parametrize("method", [ZIP_STORED, ZIP_DEFLATED])
def test_accepts_stored_and_deflated_entries_without_a_length(http: Server, tmp_path: Path, method: int) -> None:
    url = http.url("/unsized.zip", unsized(zip_of(GOOD_FILES, method)))
    totals: list[int | None] = []
    download(url, tmp_path / "data", lambda stage, done, total: totals.append(total))
    assert totals[0] is None
    assert content_of(tmp_path / "data") == GOOD_FILES


def test_follows_redirects_that_stay_safe(https: Server, http: Server, tmp_path: Path) -> None:
    good = https.url("/good.zip", GOOD_ZIP)
    for number, url in enumerate([https.url("/moved", status(302, good)), http.url("/up", status(308, good))]):
        download(url, tmp_path / str(number), silent)
        assert content_of(tmp_path / str(number)) == GOOD_FILES


def test_asks_no_proxy_for_this_machine(https: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    download(https.url("/good.zip", GOOD_ZIP), tmp_path / "data", silent)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.zip",
        "http://127.0.0.1.example.com/a.zip",
        "ftp://127.0.0.1/a.zip",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "https://",
        "https:///a.zip",
        "https://[::1/a.zip",
        "https://host:port/a.zip",
        "https://host/a b.zip",
        "https://host/ä.zip",
        "https://host/\x1b[31m.zip",
    ],
)
def test_refuses_a_url_that_is_not_https(tmp_path: Path, url: str) -> None:
    assert "expected https://" in failure(url, tmp_path / "data")


def test_shows_no_secret_of_a_url(https: Server, tmp_path: Path) -> None:
    assert "hunter2" not in failure("https://me:hunter2@host/a.zip", tmp_path / "data")
    url = https.url("/a.zip?signature=hunter2", status(403))
    assert "hunter2" not in failure(url, tmp_path / "data")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(404, InputError), (403, InputError), (429, RunError), (500, RunError), (503, RunError)],
)
def test_names_the_status_of_a_refusal(https: Server, tmp_path: Path, code: int, kind: type[CatsdogsError]) -> None:
    message = failure(https.url("/gone.zip", status(code)), tmp_path / "data", kind)
    assert str(code) in message
    assert "--url" in message


@pytest.mark.parametrize("target", ["http://example.com/a.zip", "ftp://example.com/a.zip", "file:///etc/passwd"])
def test_refuses_a_redirect_away_from_https(https: Server, tmp_path: Path, target: str) -> None:
    failure(https.url("/moved", status(302, target)), tmp_path / "data")


def test_refuses_a_redirect_from_https_to_http_on_this_machine(https: Server, http: Server, tmp_path: Path) -> None:
    target = http.url("/good.zip", GOOD_ZIP)
    message = failure(https.url("/moved", status(302, target)), tmp_path / "data")
    assert "redirects to" in message
    assert "expected https" in message


def test_refuses_a_redirect_from_this_machine_to_http_elsewhere(http: Server, tmp_path: Path) -> None:
    url = http.url("/moved", status(301, "http://example.com/a.zip"))
    assert "example.com" in failure(url, tmp_path / "data")


def test_reports_a_certificate_that_is_not_trusted(https_server: Server, tmp_path: Path) -> None:
    url = https_server.url("/good.zip", GOOD_ZIP)
    message = failure(url, tmp_path / "data", RunError)
    assert "self-signed certificate" in message
    assert "SSL_CERT_FILE" in message


def test_reports_a_host_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    message = failure("https://nowhere.invalid/a.zip", tmp_path / "data", RunError)
    assert "nowhere.invalid" in message
    assert "--url" in message


def test_reports_a_refused_connection(tmp_path: Path) -> None:
    assert "refused" in failure("http://127.0.0.1:9/a.zip", tmp_path / "data", RunError)


def test_gives_up_on_a_server_that_stalls(https: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        whole(b"PK", 100)(handler)
        https.stalled.wait(5)

    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    assert "timed out" in failure(https.url("/slow.zip", answer), tmp_path / "data", RunError)


def test_reports_an_answer_that_is_not_http(http: Server, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x1b[31mhello\r\n")

    failure(http.url("/odd.zip", answer), tmp_path / "data", RunError)


def test_reports_a_body_that_ends_early(https: Server, tmp_path: Path) -> None:
    body = GOOD_ZIP
    message = failure(https.url("/short.zip", whole(body[:-100], len(body))), tmp_path / "data", RunError)
    assert str(len(body)) in message


@pytest.mark.parametrize("answer", [whole, unsized])
def test_bounds_the_download(
    https: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[bytes], Answer]
) -> None:
    body = GOOD_ZIP
    monkeypatch.setattr(module, "MAX_DOWNLOAD_BYTES", len(body) - 1)
    url = https.url("/large.zip", answer(body))
    assert f"at most {len(body) - 1:,}" in failure(url, tmp_path / "data")


@pytest.mark.parametrize("name", ["photo.jpg", ".hidden"])
def test_never_touches_a_folder_that_is_not_empty(https: Server, tmp_path: Path, name: str) -> None:
    output = tmp_path / "data"
    output.mkdir()
    (output / name).write_bytes(PHOTO)
    message = failure(https.url("/good.zip", GOOD_ZIP), output)
    assert "expected an empty or absent folder" in message
    assert content_of(output) == {name: PHOTO}


@pytest.mark.parametrize("below", [".", "below"])
def test_refuses_a_file_as_output(https: Server, tmp_path: Path, below: str) -> None:
    (tmp_path / "data").write_bytes(PHOTO)
    url = https.url("/good.zip", GOOD_ZIP)
    assert "not a folder" in failure(url, tmp_path / "data" / below)


@pytest.mark.parametrize("exists", [True, False])
def test_keeps_what_another_run_put_there_in_the_meantime(https: Server, tmp_path: Path, exists: bool) -> None:
    output = tmp_path / "data"
    if exists:
        output.mkdir()

    def progress(stage: str, done: int, total: int | None) -> None:
        output.mkdir(exist_ok=True)
        (output / "theirs").write_bytes(b"theirs")

    with pytest.raises(InputError, match="not empty"):
        download(https.url("/good.zip", GOOD_ZIP), output, progress)
    assert content_of(output) == {"theirs": b"theirs"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("stage", ["download", "unpack"])
@pytest.mark.parametrize("exists", [True, False])
def test_leaves_nothing_when_interrupted(
    https: Server, tmp_path: Path, error: type[BaseException], stage: str, exists: bool
) -> None:
    output = tmp_path / "data"
    if exists:
        output.mkdir()

    def progress(current: str, done: int, total: int | None) -> None:
        if current == stage:
            assert len(content_of(tmp_path)) > 0
            raise error

    with pytest.raises(error):
        download(https.url("/good.zip", GOOD_ZIP), output, progress)
    assert list(tmp_path.rglob("*")) == ([output] if exists else [])


def test_takes_back_what_it_renamed_when_a_rename_fails(
    https: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_on_the_second(path: Path, target: Path) -> Path:
        if any(tmp_path.glob("train*")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_second)
    url = https.url("/two.zip", zip_of({"train/a.jpg": PHOTO, "train.txt": PHOTO}))
    with pytest.raises(RunError, match="Input/output error"):
        download(url, tmp_path, silent)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stage", ["download", "unpack"])
@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, RunError), (errno.EROFS, InputError)])
def test_reports_a_disk_that_is_full_or_read_only(
    https: Server, tmp_path: Path, stage: str, code: int, kind: type[CatsdogsError]
) -> None:
    def progress(current: str, done: int, total: int | None) -> None:
        if current == stage:
            raise OSError(code, os.strerror(code))

    with pytest.raises(kind, match=os.strerror(code)):
        download(https.url("/good.zip", GOOD_ZIP), tmp_path / "data", progress)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "train/../../evil",
        "..",
        "./train/a",
        "train//a",
        "train/./a",
        "/etc/evil",
        "//host/evil",
        "C:/evil",
        "c:evil",
        "train\\..\\evil",
        "train/\x1b[31mred\n.jpg",
        "train/\x85.jpg",
        "train/" + "a" * 256,
        "train/" + "ä" * 128,
        "/".join("a" * 600),
        "/",
    ],
)
def test_refuses_an_unsafe_name(https: Server, tmp_path: Path, name: str) -> None:
    url = https.url("/unsafe.zip", zip_of({"train/good.jpg": PHOTO, name: b""}))
    message = failure(url, tmp_path / "data")
    assert f"zip entry {name[:200]!r}" in message
    assert not (tmp_path / "evil").exists()


def test_refuses_a_name_with_a_nul(https: Server, tmp_path: Path) -> None:
    body = patched(zip_of({"train/a.jpg_x": PHOTO}), b"a.jpg_x", b"a.jpg\0x")
    assert "control character" in failure(https.url("/nul.zip", body), tmp_path / "data")


def test_refuses_a_name_that_is_empty(https: Server, tmp_path: Path) -> None:
    body = with_field(zip_of({"a": PHOTO}), 28, struct.pack("<HH", 0, 1))  # its letter becomes an extra field
    assert "name that is empty" in failure(https.url("/empty.zip", body), tmp_path / "data")


@pytest.mark.parametrize("name", ["train/" + "a" * 255, "train/C:.jpg", "..a/b..", "日本/\u3000猫.jpg", " "])
def test_accepts_an_odd_but_harmless_name(https: Server, tmp_path: Path, name: str) -> None:
    download(https.url("/odd.zip", zip_of({name: PHOTO})), tmp_path / "data", silent)
    assert content_of(tmp_path / "data") == {name: PHOTO}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR])
def test_refuses_a_special_entry(https: Server, tmp_path: Path, kind: int) -> None:
    info = ZipInfo("train/link")
    info.external_attr = (kind | 0o777) << 16
    message = failure(https.url("/link.zip", zip_of([(info, b"/etc/passwd")])), tmp_path / "data")
    assert "link or special file" in message


def test_gives_no_file_the_permissions_of_the_zip(https: Server, tmp_path: Path) -> None:
    info = ZipInfo("train/a.jpg")
    info.external_attr = (stat.S_IFREG | 0o6777) << 16
    download(https.url("/setuid.zip", zip_of([(info, PHOTO)])), tmp_path / "data", silent)
    assert not (tmp_path / "data/train/a.jpg").stat().st_mode & 0o6111


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train/a.jpg", "train/b.jpg"),
        ("train/a.jpg", "train/A.jpg"),
        ("train/a.jpg", "Train/b.jpg"),
        ("train/a", "train/a/b.jpg"),
        ("train/a/b.jpg", "train/a"),
        ("train/stra\u00dfe", "train/STRASSE"),
        ("train/\u00e4", "train/a\u0308"),
    ],
)
def test_refuses_names_that_collide(https: Server, tmp_path: Path, first: str, second: str) -> None:
    body = zip_of({first: PHOTO, second: PHOTO})
    if second == "train/b.jpg" and first == "train/a.jpg":
        body = body.replace(b"train/b.jpg", b"train/a.jpg")
    assert "collides" in failure(https.url("/twice.zip", body), tmp_path / "data")


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000])
def test_refuses_an_encrypted_entry(https: Server, tmp_path: Path, flag: int) -> None:
    body = with_field(GOOD_ZIP, 8, struct.pack("<H", flag))
    assert "encrypted" in failure(https.url("/encrypted.zip", body), tmp_path / "data")


def test_refuses_other_compressions(https: Server, tmp_path: Path) -> None:
    url = https.url("/bzip2.zip", zip_of({"train/a.jpg": PHOTO}, ZIP_BZIP2))
    assert "neither stored nor deflated" in failure(url, tmp_path / "data")


def test_refuses_a_bomb(https: Server, tmp_path: Path) -> None:
    url = https.url("/bomb.zip", zip_of({"train/a.jpg": PHOTO, "train/bomb": bytes(5_000_000)}))
    message = failure(url, tmp_path / "data")
    assert "'train/bomb'" in message
    assert "200 times" in message


def test_refuses_a_bomb_that_declares_a_small_size(https: Server, tmp_path: Path) -> None:
    content = bytes(5_000_000)
    body = with_field(zip_of({"train/bomb": content}), 24, struct.pack("<I", 1000))
    body = with_field(body, 16, struct.pack("<I", zlib.crc32(content[:1000])))
    assert "'train/bomb'" in failure(https.url("/liar.zip", body), tmp_path / "data")


def test_refuses_a_bomb_that_declares_a_large_packed_size(https: Server, tmp_path: Path) -> None:
    body = with_field(zip_of({"train/bomb": bytes(5_000_000), "train/a.jpg": PHOTO * 10}), 20, b"\0\x70\0\0")
    assert "overlaps" in failure(https.url("/liar.zip", body), tmp_path / "data")


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("method", [ZIP_STORED, ZIP_DEFLATED])
def test_refuses_an_entry_whose_size_is_not_as_declared(
    https: Server, tmp_path: Path, difference: int, method: int
) -> None:
    size = struct.pack("<I", len(PHOTO) + difference)
    body = with_field(zip_of({"train/a.jpg": PHOTO}, method), 24, size)
    assert "than it declares" in failure(https.url("/liar.zip", body), tmp_path / "data")


def test_refuses_entries_that_share_their_bytes(https: Server, tmp_path: Path) -> None:
    body = zip_of({"train/a.jpg": PHOTO, "train/b.jpg": PHOTO})
    last = body.rindex(b"PK\x01\x02")
    body = body[: last + 42] + struct.pack("<I", 0) + body[last + 46 :]
    assert "overlaps" in failure(https.url("/shared.zip", body), tmp_path / "data")


@pytest.mark.parametrize(
    ("constant", "limit"),
    [("MAX_FILES", 3), ("MAX_FILES", 7), ("MAX_UNPACKED_BYTES", 1_250_000), ("MAX_DIRECTORY_BYTES", 100)],
)
def test_bounds_the_zip(
    https: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, limit: int
) -> None:
    url = https.url("/good.zip", GOOD_ZIP)
    monkeypatch.setattr(module, constant, limit)
    assert f"at most {limit:,}" in failure(url, tmp_path / "data")


def test_refuses_a_flipped_bit(https: Server, tmp_path: Path) -> None:
    body = zip_of({"train/a.jpg": PHOTO}, ZIP_STORED)
    body = patched(body, PHOTO[:8], bytes(8))
    assert "'train/a.jpg'" in failure(https.url("/damaged.zip", body), tmp_path / "data")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>log in</html>", b"PK\x03\x04", GOOD_ZIP[:-30], GOOD_ZIP[:1000]],
    ids=["nothing", "html", "magic", "truncated", "start"],
)
def test_refuses_what_is_not_a_zip(https: Server, tmp_path: Path, body: bytes) -> None:
    assert "not a sound zip" in failure(https.url("/not.zip", body), tmp_path / "data")


@pytest.mark.parametrize("files", [{}, {"train/": b""}, {"__MACOSX/a": b"x"}])
def test_refuses_a_zip_without_files(https: Server, tmp_path: Path, files: dict[str, bytes]) -> None:
    assert "no files" in failure(https.url("/empty.zip", zip_of(files)), tmp_path / "data")


def test_damage_anywhere_is_an_error_of_ours_or_harmless(http: Server, tmp_path: Path) -> None:
    random_ = random.Random(0)
    sound = zip_of({"train/a.jpg": PHOTO[:60], "train/dogs/b.jpg": b"b" * 90, "train/c.jpg": b""})
    for _ in range(200):
        body = bytearray(sound)
        for _ in range(random_.choice([1, 1, 2, 8])):
            body[random_.randrange(len(body))] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)])
        with suppress(InputError):
            download(http.url("/fuzz.zip", bytes(body)), tmp_path / "data", silent)
        assert {path.name for path in tmp_path.iterdir()} <= {"data"}
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
