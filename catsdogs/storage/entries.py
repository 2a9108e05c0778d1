"""Listed files, and which names are listed."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from catsdogs.schema import FILES

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file; `version` is S3's etag, or the modification time in ns of a local file."""

    path: str
    size_bytes: int | None = None
    version: str | None = None


def build_files_table(entries: Iterable[Entry]) -> pa.Table:
    """Build a table of `schema.FILES` from listed files, in their order."""
    listed = list(entries)
    return pa.table([[getattr(entry, name) for entry in listed] for name in FILES.names], schema=FILES)


def is_listed(name: str, extensions: tuple[str, ...] = EXTENSIONS) -> bool:
    """Whether a file of this name is listed: it has one of the extensions, in any case, and is not hidden."""
    return name.lower().endswith(extensions) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is ignored; `.ipynb_checkpoints` is."""
    return name.startswith(".") or name == "__MACOSX"
