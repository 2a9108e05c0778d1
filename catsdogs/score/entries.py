"""--input -> the files to score, in the order of `path_key`, each once."""

import csv
import io
from collections.abc import Iterator

import pyarrow as pa

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError
from catsdogs.progress import Progress
from catsdogs.schema import table_of

MANIFEST_SUFFIXES = (".parquet", ".csv", ".txt")


def path_key(path: str) -> bytes:
    """Order paths as a listing does: by their own bytes, also where a `file://` URI quotes them."""
    return storage.local_path(path) if path.startswith("file://") else path.encode()


def entries_of(
    config: ScoreConfig, progress: Progress, unlisted: dict[str, str], start_after: str
) -> Iterator[storage.Entry]:
    """Stream the input's files that come after a path; what cannot be listed goes into `unlisted`.

    Raises:
        InputError: the input cannot be listed, or the manifest cannot be read.
    """
    if config.input.lower().endswith(MANIFEST_SUFFIXES):
        after = path_key(start_after)
        yield from (storage.Entry(path) for path in _named(config) if path_key(path) > after)
        return
    listing = storage.Listing(config.input, progress, start_after=start_after)
    yield from listing
    unlisted.update(listing.unlisted)


def _named(config: ScoreConfig) -> list[str]:
    """Read a manifest's paths."""
    return sorted({_checked(path, config.input) for path in _manifest_paths(config.input)}, key=path_key)


def _manifest_paths(uri: str) -> list[str]:
    content = storage.read_bytes(uri)
    try:
        if uri.lower().endswith(".txt"):
            lines = content.decode("utf-8-sig").split("\n")
            return [line.removesuffix("\r") for line in lines if line.strip()]
        if uri.lower().endswith(".csv"):
            return [row["path"] for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig")))]
        paths: list[str] = table_of(content, ["path"])["path"].to_pylist()
        return paths
    except (KeyError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(
            f"{uri}: expected a manifest with a column named path (or one path a line in .txt): {error!r}"
        ) from error


def _checked(path: object, manifest: str) -> str:
    if not isinstance(path, str) or not path:
        raise InputError(f"{manifest}: expected a path in every row of its column path, got {path!r}")
    return storage.absolute(path)
