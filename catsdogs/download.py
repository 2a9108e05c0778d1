"""Fetch a zip of labelled images and unpack it, trusting neither the server nor the zip.

Every entry is checked before the first is unpacked; unpacking stops at the first byte beyond what an entry
declares. All of it in a hidden temporary folder, then a rename. Source: PKWARE APPNOTE 6.3.10, 4.3.7, 4.4.4.
"""

import errno
import io
import os
import re
import stat
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from catsdogs.errors import InputError, RunError

TIMEOUT_S = 30.0  # of each connect and read
CHUNK_BYTES = 1 << 20
MAX_DOWNLOAD_BYTES = 2 << 30
MAX_DIRECTORY_BYTES = 64 << 20  # the zip's table of entries, which zipfile reads in one go
MAX_FILES = 200_000  # and folders
MAX_UNPACKED_BYTES = 8 << 30
MAX_RATIO = 200  # photos: about 1; the most that DEFLATE reaches: 1032 (zlib, technical details)
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255  # NAME_MAX of Linux
TEMPORARY_PREFIX = ".catsdogs-download-"  # left behind by a killed run, it is no content
_LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
_USER_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTEMPTY)
_BAD_ZIP = (BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError, zlib.error)
Progress = Callable[[str, int, int | None], None]


def download(url: str, output: Path, progress: Progress) -> Path:
    """Fetch a zip of labelled images over https (http on this machine) and unpack it into a folder.

    Args:
        output: absent or empty; it is filled whole or not at all.
        progress: called with stage, done, total: "download" counts bytes, "unpack" files.

    Returns:
        The folder that holds `train/`: `output` or one right under it; `output` where there is none.

    Raises:
        InputError: the URL, the output or the zip cannot be used.
        RunError: the network or the disk failed.
    """
    _check_url("--url", url, http=True)
    target = Path(os.path.realpath(output))
    try:
        home = _find_home(target)
        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=home, ignore_cleanup_errors=True) as folder:
            archive, unpacked = Path(folder, "download.zip"), Path(folder, "unpacked")
            _fetch(url, archive, progress)
            _unpack(archive, unpacked, progress)
            _publish(unpacked, target)
    except OSError as error:
        kind = InputError if error.errno in _USER_ERRNOS else RunError
        raise kind(f"--output {target}: {error.strerror or error}; make room or give another") from error
    candidates = (output, *sorted(output.iterdir()))
    return next((folder for folder in candidates if (folder / "train").is_dir()), output)


def _find_home(target: Path) -> Path:
    """Choose where to work: in the empty target (it may be a mount), else in the nearest folder above."""
    home = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not home.is_dir():
        raise InputError(f"{home} is not a folder: expected an empty or absent folder; give another --output")
    if home == target and not all(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(target)):
        raise InputError(f"{target} is not empty: expected an empty or absent folder; give another --output")
    return home


def _publish(unpacked: Path, target: Path) -> None:
    """Rename into place; a target that exists keeps its inode, which may be a mount or a shell's folder."""
    if unpacked.parent.parent != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(target)
        return
    _find_home(target)  # still empty
    with ExitStack() as undo:
        for name in os.listdir(unpacked):
            (unpacked / name).rename(target / name)
            undo.callback(os.rename, target / name, unpacked / name)
        undo.pop_all()


def _check_url(source: str, url: str, http: bool) -> None:
    with suppress(ValueError):
        parts = urlsplit(url)
        schemes = ("https", "http") if http and parts.hostname in _LOOPBACK_HOSTS else ("https",)
        odd = not parts.hostname or "@" in parts.netloc or parts.port == 0 or re.search("[^!-~]", url)
        if parts.scheme in schemes and not odd:
            return
    raise InputError(f"{source} {_shown(url)}: expected https://HOST/FILE.zip, no user, no bare spaces")


def _shown(url: str) -> str:
    """Leave out what may be secret: the user, and the query with its signature."""
    return repr(re.sub(r"[^/]*@|[?#].*", "", url, flags=re.DOTALL)[:300])


class _SafeRedirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        fp.close()  # else urllib reads the body of a redirect to its end
        _check_url(f"{_shown(req.full_url)} redirects to", newurl, http=req.type == "http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        error.close()
        kind = RunError if error.code >= 500 or error.code in (408, 429) else InputError
        raise kind(f"{_shown(url)} answered {error.code}, expected 200; try another --url") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = repr(str(getattr(error, "reason", None) or error))  # URLError wraps the real one
        raise RunError(f"cannot fetch {_shown(url)}: {reason}; check network, SSL_CERT_FILE, --url") from error


def _fetch(url: str, path: Path, progress: Progress) -> None:
    with path.open("xb") as file:
        for chunk, done, total in _body(url):
            file.write(chunk)
            progress("download", done, total)


def _body(url: str) -> Iterator[tuple[bytes, int, int | None]]:
    num_bytes = 0
    proxies = ProxyHandler({}) if urlsplit(url).hostname in _LOOPBACK_HOSTS else ProxyHandler()
    with _network_errors(url), build_opener(proxies, _SafeRedirects).open(url, timeout=TIMEOUT_S) as response:
        total: int | None = response.length
        while chunk := response.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            _check_limit("bytes", max(num_bytes, total or 0), MAX_DOWNLOAD_BYTES)
            yield chunk, num_bytes, total
    if total is not None and num_bytes != total:
        raise RunError(f"{_shown(url)} ended after {num_bytes} of {total} bytes; run again or try another --url")


def _check_limit(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise InputError(f"the zip has {number:,} {what}, expected at most {limit:,}; try another --url")


class _ZipReader(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        _check_limit("bytes of directory", size or 0, MAX_DIRECTORY_BYTES)
        return super().read(size) or b""


def _unpack(path: Path, folder: Path, progress: Progress) -> None:
    with _ZipReader(path) as file:
        try:
            archive = ZipFile(file)
        except _BAD_ZIP as error:
            raise InputError(f"not a sound zip: {str(error)!r}; try another --url") from error
        infos = _checked_files(archive.infolist())
        for done, info in enumerate(infos, start=1):
            member = folder / info.orig_filename
            member.parent.mkdir(parents=True, exist_ok=True)
            with member.open("xb") as target:
                target.writelines(_content(archive, info))
            progress("unpack", done, len(infos))


def _content(archive: ZipFile, info: ZipInfo) -> Iterator[bytes]:
    """Yield the bytes of one entry, exactly as many as it declares."""
    num_bytes, declared_bytes = 0, info.file_size
    info.file_size += 1  # zipfile stops at this size without a word; one more byte shows the lie
    try:
        with archive.open(info) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                yield chunk
    except _BAD_ZIP as error:
        _refuse(info, f"damaged, {str(error)!r}", error)
    if num_bytes != declared_bytes:
        _refuse(info, "more or fewer bytes than it declares")


def _refuse(info: ZipInfo, reason: str, cause: Exception | None = None) -> NoReturn:
    raise InputError(f"zip entry {info.orig_filename[:200]!r}: {reason}; try another --url") from cause


def _checked_files(infos: list[ZipInfo]) -> list[ZipInfo]:
    """Refuse the zip for its first fault; leave out folders, and what macOS adds."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        # No byte counts for two entries: so the bound on each one's ratio holds for the whole zip.
        faults = _faults(info) | {"it overlaps another entry": info.header_offset < end}
        if reason := next((reason for reason, found in faults.items() if found), None):
            _refuse(info, reason)
        end = info.header_offset + 30 + info.compress_size  # 30: the least local header
    _check_collisions(infos)
    _check_limit("unpacked bytes", sum(info.file_size for info in infos), MAX_UNPACKED_BYTES)
    files = [info for info in infos if not re.search(r"/$|(^|/)(__MACOSX/|\.DS_Store$)", info.orig_filename)]
    if not files:
        raise InputError("the zip has no files, expected labelled images; try another --url")
    return files


def _faults(info: ZipInfo) -> dict[str, object]:
    path = info.orig_filename  # zipfile cuts .filename at a NUL
    names = path.removesuffix("/").split("/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    return {
        "an absolute path": path.startswith("/"),
        "a drive letter": re.match("[A-Za-z]:", path),
        "a backslash in the name": "\\" in path,
        "a control character in the name": re.search(r"[\0-\x1f\x7f-\x9f]", path),
        "a name that is empty, . or ..": not {"", ".", ".."}.isdisjoint(names),
        f"a path over {MAX_PATH_BYTES} bytes": len(path.encode()) > MAX_PATH_BYTES,
        f"a name over {MAX_NAME_BYTES} bytes": max(len(name.encode()) for name in names) > MAX_NAME_BYTES,
        "a link or special file": kind not in (0, stat.S_IFDIR if path.endswith("/") else stat.S_IFREG),
        "encrypted": info.flag_bits & 0x2041,  # encrypted, strongly encrypted, masked
        "neither stored nor deflated": info.compress_type not in (ZIP_STORED, ZIP_DEFLATED),
        f"over {MAX_RATIO} times its packed size": info.file_size > MAX_RATIO * info.compress_size,
    }


def _check_collisions(infos: list[ZipInfo]) -> None:
    """Refuse names that are the same, also to a file system that ignores case or the form of Unicode."""
    owners: dict[str, str | ZipInfo] = {}
    for info in infos:
        for end in re.finditer(r"/|\Z", info.orig_filename):  # the folders above, then the entry
            path = info.orig_filename[: end.end()]
            owner = path if path.endswith("/") else info
            folded = unicodedata.normalize("NFD", path.removesuffix("/").casefold())
            if owners.setdefault(folded, owner) != owner:
                _refuse(info, "its name collides with another one")
    _check_limit("files and folders", len(owners), MAX_FILES)
