"""--input -> the files to score, in the order of `path_key`, each once."""

import csv
import io
from collections.abc import Iterator
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError
from catsdogs.progress import Progress

MANIFEST_SUFFIXES = (".parquet", ".csv", ".txt")


def sort_key(path: str) -> bytes:
    """Order paths as a listing does: by their own bytes, also where a `file://` URI quotes them."""
    return storage.local_path(path) if path.startswith("file://") else path.encode()


def list_inputs(
    config: ScoreConfig, progress: Progress, unlisted: dict[str, str], start_after: str
) -> Iterator[storage.Entry]:
    """Stream the input's files that come after a path; what cannot be listed goes into `unlisted`.

    Raises:
        InputError: the input cannot be listed, or the manifest cannot be read.
    """
    if config.input.lower().endswith(MANIFEST_SUFFIXES):
        after = sort_key(start_after)
        yield from (storage.Entry(path) for path in _read_manifest(config) if sort_key(path) > after)
        return
    yield from storage.Listing(
        config.input, progress, unlisted=unlisted, start_after=start_after, collect_folders=False
    )


def _read_manifest(config: ScoreConfig) -> Iterator[str]:
    """Stream a manifest's paths; one that is not in order is sorted first, which takes the memory of all of them."""
    content = storage.read_bytes(config.input)
    if all(sort_key(one) < sort_key(following) for one, following in pairwise(_paths(config.input, content))):
        return _paths(config.input, content)
    return iter(sorted(set(_paths(config.input, content)), key=sort_key))


def _paths(manifest: str, content: bytes) -> Iterator[str]:
    try:
        for path in _rows(manifest, content):
            yield _checked(path, manifest)
    except (KeyError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(
            f"{manifest}: expected a manifest with a column named path (or one path a line in .txt): {error!r}"
        ) from error


def _rows(manifest: str, content: bytes) -> Iterator[object]:
    if manifest.lower().endswith(".parquet"):
        file = pq.ParquetFile(pa.BufferReader(content))
        file.schema_arrow.field("path")
        for batch in file.iter_batches(columns=["path"]):
            yield from batch["path"].to_pylist()
        return
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="\n")
    if manifest.lower().endswith(".csv"):
        yield from (row["path"] for row in csv.DictReader(text))
    else:
        yield from (line.rstrip("\n").removesuffix("\r") for line in text if line.strip())


def _checked(path: object, manifest: str) -> str:
    if not isinstance(path, str) or not path:
        raise InputError(f"{manifest}: expected a path in every row of its column path, got {path!r}")
    return storage.absolute(path)
