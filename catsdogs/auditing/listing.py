"""List the images of a set, with labels, splits and groups where they are known, and those of `--against`."""

import itertools
from collections.abc import Iterable

import pyarrow as pa

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
    if config.input is None:
        found = list_all(LabelSource.from_config(config), progress)
        class_names = found.class_names
        files = _build_table(
            (row.entry, row.label, split or None, row.group) for split, rows in found.rows.items() for row in rows
        )
    else:
        class_names = {}
        is_list = is_path_list(config.input)
        exclusion = Exclusion.read(config.exclude, None if is_list else config.input)
        entries = _list_images("--input", config.input, config.allow_schemes, progress)
        files = _build_table((entry, None, None, None) for entry in exclusion.filter(entries, progress))
    if config.against is None:
        return AuditedSets(files, SET_FILES.empty_table(), class_names)
    against = _list_images("--against", config.against, config.allow_schemes, progress)
    progress(Message(f"{len(against):,} images in {config.against} to compare with"))
    return AuditedSets(files, _build_table((entry, None, None, None) for entry in against), class_names)


def _list_images(flag: str, uri: str, allow_schemes: str | None, progress: Progress) -> list[storage.Entry]:
    """List the images of a folder or prefix, or those that a list names, each once; InputError if there are none."""
    if is_path_list(uri) or (flag == "--against" and uri.lower().endswith(TABLES)):
        return _find_listed(flag, uri, allow_schemes)
    listing = storage.Listing(uri, progress, collect_folders=False)
    entries = list(listing)
    for path, reason in listing.unlisted.items():
        progress(Message(f"could not list {path}: {reason}"))
    if not entries:
        expected = f"expected names that end in {' '.join(storage.EXTENSIONS)}"
        raise InputError(f"no images under {uri}: {listing.describe_other_files()}; {expected}; check {flag}")
    return entries


def _find_listed(flag: str, uri: str, allow_schemes: str | None) -> list[storage.Entry]:
    """Find the files of a path list, or of a table that is compared with, whose paths may be relative to it."""
    is_table = flag == "--against" and uri.lower().endswith(TABLES)
    paths = PathTable.read(uri, flag, None).iter_paths() if is_table else PathList(uri, allow_schemes)
    if not (entries := [storage.find_entry(path) for path in dict.fromkeys(paths)]):
        raise InputError(f"{flag} {uri}: expected paths of images, the list is empty")
    return entries


def _build_table(rows: Iterable[Row]) -> pa.Table:
    """Build a table of `SET_FILES`, sorted by path."""
    iterator = iter(rows)
    tables = [SET_FILES.empty_table()]
    while chunk := list(itertools.islice(iterator, CHUNK_FILES)):
        files = storage.build_files_table(row[0] for row in chunk)
        columns = [pa.array(values, pa.string()) for values in list(zip(*chunk, strict=True))[1:]]
        tables.append(pa.table([*files.columns, *columns], schema=SET_FILES))
    return pa.concat_tables(tables).sort_by("path").combine_chunks()
