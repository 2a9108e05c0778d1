"""Input -> the files to score, cut into shards of fixed rows, as Parquet under `_manifest/`.

A shard's plan, `_manifest/part-00042.parquet`, lists the files of the output's `part-00042.parquet`, sorted by path.
"""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError
from catsdogs.progress import Message, Progress
from catsdogs.schema import FILES, parquet_bytes

MANIFEST = "_manifest"
MANIFEST_SUFFIXES = (".parquet", ".csv", ".txt")
PLANNED = FILES.append(pa.field("shard", pa.int32(), nullable=False))


@dataclass(frozen=True)
class Plan:
    """The files of a run.

    Attributes:
        manifest: the plan of each shard, in order.
        sizes: rows of each shard.
        unlisted: what could not be listed, with the reason.
    """

    manifest: list[str]
    sizes: list[int]
    unlisted: dict[str, str]

    @property
    def num_files(self) -> int:
        """Files to score; each ends as one row."""
        return sum(self.sizes)


def part_name(shard: int) -> str:
    """Name the part of a shard."""
    return f"part-{shard:05d}.parquet"


def make_plan(config: ScoreConfig, progress: Progress) -> Plan:
    """List the input and write the plan, one shard at a time.

    Raises:
        InputError: there is nothing to score, or the manifest cannot be read.
    """
    unlisted: dict[str, str] = {}
    entries = _entries(config, progress, unlisted)
    if config.limit is not None:
        entries = itertools.islice(entries, config.limit)
    manifest, sizes = [], []
    for shard, chunk in enumerate(_chunks(entries, config.shard_size)):
        uri = storage.join(config.output, MANIFEST, part_name(shard))
        storage.write_bytes(uri, _shard_bytes(chunk, shard))
        manifest.append(uri)
        sizes.append(len(chunk))
    for folder, reason in unlisted.items():
        progress(Message(f"could not list {folder}: {reason}"))
    if not manifest:
        raise InputError(f"no images under {config.input}: looked for {' '.join(storage.EXTENSIONS)}; check --input")
    return Plan(manifest, sizes, unlisted)


def _entries(config: ScoreConfig, progress: Progress, unlisted: dict[str, str]) -> Iterator[storage.Entry]:
    if config.input.lower().endswith(MANIFEST_SUFFIXES):
        paths = sorted({_checked(path, config.input) for path in _manifest_paths(config.input)})
        yield from (storage.Entry(path) for path in paths)
        return
    listing = storage.Listing(config.input, progress)
    yield from listing
    unlisted.update(listing.unlisted)


def _manifest_paths(uri: str) -> list[str]:
    content = storage.read_bytes(uri)
    try:
        if uri.lower().endswith(".txt"):
            lines = content.decode("utf-8-sig").split("\n")
            return [line.removesuffix("\r") for line in lines if line.strip()]
        if uri.lower().endswith(".csv"):
            return [row["path"] for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig")))]
        paths: list[str] = pq.read_table(pa.BufferReader(content), columns=["path"])["path"].to_pylist()
        return paths
    except (KeyError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(
            f"{uri}: expected a manifest with a column named path (or one path a line in .txt): {error!r}"
        ) from error


def _checked(path: object, manifest: str) -> str:
    if not isinstance(path, str) or not path:
        raise InputError(f"{manifest}: expected a path in every row of its column path, got {path!r}")
    return storage.absolute(path)


def _chunks(entries: Iterable[storage.Entry], size: int) -> Iterator[list[storage.Entry]]:
    iterator = iter(entries)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _shard_bytes(entries: list[storage.Entry], shard: int) -> bytes:
    columns = [
        [e.path for e in entries],
        [e.size_bytes for e in entries],
        [e.version for e in entries],
        [shard] * len(entries),
    ]
    return parquet_bytes(pa.table(columns, schema=PLANNED))
