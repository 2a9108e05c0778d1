"""Download a zip of labelled images and unpack it. Neither the server nor the zip is trusted.

`zipfile` reads no more bytes than an entry declares, checks its CRC, and creates no links. This module checks the rest
before it unpacks anything. It works in a hidden temporary folder in the output, and moves the result at the end.
"""

import errno
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from catsdogs import temporaries
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Message, Progress, StageProgress

TIMEOUT_S = 30.0  # of each connect and read
CHUNK_BYTES = 1 << 20
MAX_DOWNLOAD_BYTES = 2 << 30
MAX_UNPACKED_BYTES = 8 << 30
MAX_ENTRIES = 200_000
TEMPORARY_PREFIX = ".catsdogs-download-"  # ignored in the output: a killed run may leave such a folder
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
ZIP_ERRORS = (BadZipFile, EOFError, OverflowError, RuntimeError, ValueError, zlib.error)
# Caused by the user's choice of output or by names in the zip.
USER_ERRNOS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL),
)


def download(url: str, output: Path, progress: Progress) -> Path:
    """Download a zip over https (http from this machine) and unpack it into a folder.

    Args:
        output: a new or empty folder; it stays empty on failure.
        progress: receives bytes in the stage "download", the sha256 of the zip, entries in the stage "unpack".

    Returns:
        The folder that contains `train/`: `output` or a folder directly in it; else `output`.

    Raises:
        InputError: the URL, the output or the zip cannot be used.
        RunError: the network or the disk failed.
    """
    _check_url("--url", url, allow_http=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _check_empty(output)
        with temporaries.temporary_folder(TEMPORARY_PREFIX, output) as folder:
            archive, unpacked = Path(folder, "download.zip"), Path(folder, "unpacked")
            digest = hashlib.sha256()
            with archive.open("xb") as file:
                for chunk, total in _iter_body(url):
                    file.write(chunk)
                    digest.update(chunk)
                    progress(StageProgress("download", file.tell(), total))
            progress(Message(f"sha256 of the zip: {digest.hexdigest()}"))
            _unpack(archive, unpacked, progress)
            _check_empty(output)
            for path in unpacked.iterdir():
                path.rename(output / path.name)
    except OSError as error:
        error_class = InputError if error.errno in USER_ERRNOS else RunError
        raise error_class(f"--output {output}: {error.strerror or error}; make room or choose another") from error
    candidates = (output, *sorted(output.iterdir()))
    return next((folder for folder in candidates if (folder / "train").is_dir()), output)


def _check_empty(output: Path) -> None:
    if not all(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(output)):
        raise InputError(f"{output} is not empty: expected a new or empty folder; choose another --output")


def _check_url(source: str, url: str, allow_http: bool) -> None:
    with suppress(ValueError):
        parts = urlsplit(url)
        schemes = ("https", "http") if allow_http and parts.hostname in LOOPBACK_HOSTS else ("https",)
        malformed = not parts.hostname or "@" in parts.netloc or parts.port == 0 or re.search("[^!-~]", url)
        if parts.scheme in schemes and not malformed:
            return
    raise InputError(f"{source} {_redact(url)}: expected https://HOST/FILE.zip without a user and without spaces")


def _redact(url: str) -> str:
    """Remove the user and the query, which may be secret."""
    return repr(re.sub(r"[^/]*@|[?#].*", "", url, flags=re.DOTALL)[:300])


class _CheckedRedirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        fp.close()  # else urllib reads the whole body of the redirect
        _check_url(f"{_redact(req.full_url)} redirects to", newurl, allow_http=req.type == "http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _iter_body(url: str) -> Iterator[tuple[bytes, int | None]]:
    """Iterate over the chunks of a response, each with the length of the response if it is known."""
    num_bytes = 0
    try:
        with build_opener(_CheckedRedirects).open(url, timeout=TIMEOUT_S) as response:
            total: int | None = response.length
            while chunk := response.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                _check_limit("bytes", max(num_bytes, total or 0), MAX_DOWNLOAD_BYTES)
                yield chunk, total
    except HTTPError as error:
        error.close()
        error_class = RunError if error.code >= 500 or error.code in (408, 429) else InputError
        raise error_class(f"{_redact(url)} answered {error.code}, expected 200; try another --url") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = repr(str(getattr(error, "reason", None) or error))  # of the error that URLError wraps
        raise RunError(f"cannot fetch {_redact(url)}: {reason}; check network, SSL_CERT_FILE, --url") from error
    if total is not None and num_bytes != total:
        raise RunError(f"{_redact(url)} ended after {num_bytes} of {total} bytes; run again or try another --url")


def _check_limit(unit: str, number: int, limit: int) -> None:
    if number > limit:
        raise InputError(f"the zip has {number:,} {unit}, expected at most {limit:,}; try another --url")


def _unpack(path: Path, folder: Path, progress: Progress) -> None:
    try:
        with ZipFile(path) as archive:
            infos = archive.infolist()
            _check_entries(infos)
            folder.mkdir()
            for done, info in enumerate(infos, start=1):
                archive.extract(info, folder)
                progress(StageProgress("unpack", done, len(infos)))
    except ZIP_ERRORS as error:
        raise InputError(f"not a valid zip: {str(error)!r}; try another --url") from error


def _check_entries(infos: list[ZipInfo]) -> None:
    _check_limit("entries", len(infos), MAX_ENTRIES)
    _check_limit("unpacked bytes", sum(info.file_size for info in infos), MAX_UNPACKED_BYTES)
    for info in infos:
        if reason := _find_fault(info):
            raise InputError(f"zip entry {info.orig_filename[:200]!r}: {reason}; try another --url")


def _find_fault(info: ZipInfo) -> str | None:
    if not info.filename or re.search(r"^/|(^|/)\.\.(/|$)", info.filename):
        return "no name, an absolute path, or .. in it"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFDIR, stat.S_IFREG):
        return "a link or special file"
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):  # zipfile bounds the memory of these two
        return "neither stored nor deflated"
    return None
