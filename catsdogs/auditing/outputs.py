"""The files that an audit writes. `audit.json` is written last, and removed first if there was one."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.auditing.issues import UNKNOWN, Findings
from catsdogs.auditing.pairs import NO_CONTENT
from catsdogs.config import AuditConfig
from catsdogs.errors import InputError
from catsdogs.schema import parquet_bytes
from catsdogs.table_files import format_csv

SUMMARY = "audit.json"
FILES, PAIRS, EXCLUDE, REPORT = "files.parquet", "pairs.parquet", "exclude.csv", "report.html"
SUSPECTS = "suspects.parquet"  # with --suspects
OUTPUTS = (FILES, PAIRS, EXCLUDE, REPORT, SUSPECTS)
ROW_GROUP = 10_000  # files
PAIRS_ROW_GROUP = 100_000
AUDITED_FILES = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size_bytes", pa.int64()),
        ("format", pa.string()),
        ("extension_ok", pa.bool_()),
        ("orientation", pa.int32()),
        ("mode", pa.string()),
        ("frames", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("brightness", pa.float32()),
        ("contrast", pa.float32()),
        ("sharpness", pa.float32()),
        ("group", pa.string()),
        ("issues", pa.list_(pa.string())),
    ]
)
AUDITED_PAIRS = pa.schema(
    [
        pa.field("path_a", pa.string(), nullable=False),
        pa.field("path_b", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("distance", pa.int32(), nullable=False),
        ("same_label", pa.bool_()),
        pa.field("cross_split", pa.bool_(), nullable=False),
    ]
)


def check_output(config: AuditConfig) -> None:
    """Check that the output is a folder, and that no table that is read would be overwritten.

    Raises:
        InputError: it is a file, or a table that is read would be overwritten.
    """
    storage.list_names(config.output)
    written = {storage.join(config.output, name): name for name in (*OUTPUTS, SUMMARY)}
    for flag in ("labels", "exclude", "input", "against"):
        if (uri := getattr(config, flag)) in written:
            raise InputError(
                f"--{flag} {uri}: expected a table outside of --output, where the audit writes a new {written[uri]}; "
                "choose another --output"
            )


def write_audit(output: str, findings: Findings, page: str, summary: dict[str, Any]) -> None:
    """Write all files; raises RunError if one cannot be written."""
    storage.remove_files(output, [SUMMARY, SUSPECTS])
    for name, content in _iter_contents(findings, page, summary):
        storage.write_bytes(storage.join(output, name), content)


def _iter_contents(findings: Findings, page: str, summary: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    files = findings.files.set_column(findings.files.column_names.index("group"), "group", name_groups(findings))
    yield FILES, _build_parquet(AUDITED_FILES, _iter_files(files))
    yield EXCLUDE, format_csv([("path", "reason"), *findings.excluded]).encode()
    yield REPORT, page.encode()
    yield PAIRS, _build_parquet(AUDITED_PAIRS, _iter_pairs(findings))
    if findings.suspects is not None:
        yield SUSPECTS, parquet_bytes(findings.suspects.table)
    yield SUMMARY, json.dumps(summary, indent=2).encode()


def _build_parquet(schema: pa.Schema, tables: Iterable[pa.Table]) -> bytes:
    """Write each table as a row group."""
    with tempfile.TemporaryFile(prefix="catsdogs-") as file:  # a buffer in memory would be copied while it grows
        with pq.ParquetWriter(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        file.seek(0)
        return file.read()


def name_groups(findings: Findings) -> pa.ChunkedArray:
    """Name the group of each file: in a set without splits, also one for equal and near images, after its first path.

    `train` then splits the set without a pair on both sides.
    """
    from catsdogs.auditing.folds import join_groups  # not at the top: imports scipy

    files, pairs = findings.files, findings.pairs
    groups: pa.ChunkedArray = files["group"]
    if files["split"].null_count < len(files):
        return groups
    content_N = pairs.content_N[: len(files)]
    is_inside = np.maximum(pairs.a_P, pairs.b_P) < len(files)  # not with a file of --against
    ends = pairs.a_P[is_inside].astype(np.int64), pairs.b_P[is_inside].astype(np.int64)
    number_N = join_groups(groups.combine_chunks(), pa.array(content_N, mask=content_N == NO_CONTENT), pairs=ends)
    _, first_N, counts_N = np.unique(number_N, return_index=True, return_counts=True)
    first_N = first_N[number_N]  # the first row of each file's group
    names = pc.coalesce(groups.take(pa.array(first_N)), files["path"].take(pa.array(first_N)))
    return pa.chunked_array(
        [pc.if_else(pa.array(counts_N[number_N] > 1), names.combine_chunks(), groups.combine_chunks())]
    )


def _iter_files(files: pa.Table) -> Iterator[pa.Table]:
    return (_build_files(files.slice(start, ROW_GROUP)) for start in range(0, len(files), ROW_GROUP))


def _build_files(files: pa.Table) -> pa.Table:
    digests = [None if digest is None else digest.hex() for digest in files["sha256"].to_pylist()]
    hashes = [None if value is None else f"{value:016x}" for value in files["phash"].to_pylist()]
    columns = {"sha256": pa.array(digests, pa.string()), "phash": pa.array(hashes, pa.string())}
    return pa.table([columns.get(name, files[name]) for name in AUDITED_FILES.names], schema=AUDITED_FILES)


def _iter_pairs(findings: Findings) -> Iterator[pa.Table]:
    pairs = findings.pairs
    paths = findings.paths.combine_chunks() if len(pairs.a_P) else pa.array([], pa.string())
    for start in range(0, len(pairs.a_P), PAIRS_ROW_GROUP):
        rows = slice(start, start + PAIRS_ROW_GROUP)
        same_label = findings.same_label_P[rows]
        columns = [
            paths.take(pa.array(pairs.a_P[rows])),
            paths.take(pa.array(pairs.b_P[rows])),
            pa.array(np.where(pairs.is_exact_P[rows], "exact", "near")),
            pa.array(pairs.distance_P[rows], pa.int32()),
            pa.array(same_label == 1, pa.bool_(), mask=same_label == UNKNOWN),
            pa.array(findings.is_cross_P[rows]),
        ]
        yield pa.table(columns, schema=AUDITED_PAIRS)
