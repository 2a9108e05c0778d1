"""List the images of a set, with labels, splits and groups where they are known, and those of `--against`."""

import itertools
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.auditing.sets import SET_FILES, AuditedSets
from catsdogs.config import AuditConfig
from catsdogs.errors import InputError
from catsdogs.labels import TABLES, Exclusion, LabelSource, PathTable, list_all
from catsdogs.path_lists import PathList, is_path_list
from catsdogs.progress import Message, Progress

CHUNK_FILES = 10_000  # listed files that are Python objects at a time

Row = tuple[storage.Entry, str | None, str | None, str | None]  # label, split, group


def list_sets(config: AuditConfig, progress: Progress) -> AuditedSets:
    """List the images that the settings name.

    Raises:
        InputError: there are none, or a table or a list cannot be read.
    """
    against = SET_FILES.empty_table()
    if config.input is None:
        found = list_all(LabelSource.from_config(config), progress)
        class_names = found.class_names
        files = _build_table(
            (row.entry, row.label, split or None, row.group) for split, rows in found.rows.items() for row in rows
        )
    else:
        class_names = {}
        exclusion = Exclusion.read(config.exclude, None if is_path_list(config.input) else config.input)
        files = _list_unlabelled("--input", config.input, config.allow_schemes, exclusion, progress)
    if config.against is not None:
        against = _list_unlabelled("--against", config.against, config.allow_schemes, Exclusion(), progress)
        progress(Message(f"{len(against):,} images in {config.against} to compare with"))
    return AuditedSets(files, against, class_names)


def _list_unlabelled(
    flag: str, uri: str, allow_schemes: str | None, exclusion: Exclusion, progress: Progress
) -> pa.Table:
    """List the images of a folder or prefix, or those that a list names, each once; InputError if there are none."""
    is_list = is_path_list(uri) or (flag == "--against" and uri.lower().endswith(TABLES))
    listing = storage.Listing(uri, progress, collect_folders=False)
    entries: Iterable[storage.Entry] = _find_listed(flag, uri, allow_schemes) if is_list else listing
    if exclusion.uri:
        entries = exclusion.filter(list(entries), progress)
    files = _build_table((entry, None, None, None) for entry in entries)
    for path, reason in listing.unlisted.items():
        progress(Message(f"could not list {path}: {reason}"))
    if not files.num_rows:
        found = "the list is empty" if is_list else listing.describe_other_files()
        expected = f"expected names that end in {' '.join(storage.EXTENSIONS)}"
        raise InputError(f"no images under {uri}: {found}; {expected}; check {flag}")
    return files


def _find_listed(flag: str, uri: str, allow_schemes: str | None) -> Iterator[storage.Entry]:
    """Find the files of a path list, or of a table that is compared with, whose paths may be relative to it."""
    is_table = flag == "--against" and uri.lower().endswith(TABLES)
    paths = PathTable.read(uri, flag, None).iter_paths() if is_table else PathList(uri, allow_schemes)
    return map(storage.find_entry, dict.fromkeys(paths))


def _build_table(rows: Iterable[Row]) -> pa.Table:
    """Build a table of `SET_FILES`, sorted by path."""
    iterator = iter(rows)
    tables = [SET_FILES.empty_table()]
    while chunk := list(itertools.islice(iterator, CHUNK_FILES)):
        files = storage.build_files_table(row[0] for row in chunk)
        columns = [pa.array(values, pa.string()) for values in list(zip(*chunk, strict=True))[1:]]
        tables.append(pa.table([*files.columns, *columns], schema=SET_FILES))
    files = pa.concat_tables(tables)
    is_sorted = pc.all(pc.less_equal(files["path"].slice(0, max(0, len(files) - 1)), files["path"].slice(1))).as_py()
    return files if is_sorted else files.sort_by("path")  # which copies all of it
