"""The files that an audit writes. `audit.json` is written last, and removed first if there was one."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.auditing.issues import UNKNOWN, Findings
from catsdogs.config import AuditConfig
from catsdogs.errors import InputError
from catsdogs.schema import parquet_bytes
from catsdogs.table_files import format_csv

SUMMARY = "audit.json"
FILES, PAIRS, EXCLUDE, REPORT = "files.parquet", "pairs.parquet", "exclude.csv", "report.html"
SUSPECTS = "suspects.parquet"  # with --suspects
OUTPUTS = (FILES, PAIRS, EXCLUDE, REPORT, SUSPECTS)
CHUNK_PAIRS = 1_000_000
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
    contents = {
        FILES: parquet_bytes(_build_files(findings.files)),
        EXCLUDE: format_csv([("path", "reason"), *findings.excluded]).encode(),
        REPORT: page.encode(),
        PAIRS: _build_pairs(findings),
        **({} if findings.suspects is None else {SUSPECTS: parquet_bytes(findings.suspects.table)}),
        SUMMARY: json.dumps(summary, indent=2).encode(),
    }
    storage.write_files(output, contents, obsolete=[SUSPECTS])


def _build_files(files: pa.Table) -> pa.Table:
    digests = [None if digest is None else digest.hex() for digest in files["sha256"].to_pylist()]
    hashes = [None if value is None else f"{value:016x}" for value in files["phash"].to_pylist()]
    columns = {"sha256": pa.array(digests, pa.string()), "phash": pa.array(hashes, pa.string())}
    return pa.table([columns.get(name, files[name]) for name in AUDITED_FILES.names], schema=AUDITED_FILES)


def _build_pairs(findings: Findings) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, AUDITED_PAIRS) as writer:
        for table in _iter_pairs(findings):
            writer.write_table(table)
    return bytes(sink.getvalue())


def _iter_pairs(findings: Findings) -> Iterator[pa.Table]:
    pairs = findings.pairs
    for start in range(0, len(pairs.a_P), CHUNK_PAIRS):
        rows = slice(start, start + CHUNK_PAIRS)
        same_label = findings.same_label_P[rows]
        columns = [
            findings.paths.take(pa.array(pairs.a_P[rows])),
            findings.paths.take(pa.array(pairs.b_P[rows])),
            pa.array(np.where(pairs.is_exact_P[rows], "exact", "near")),
            pa.array(pairs.distance_P[rows], pa.int32()),
            pa.array(same_label == 1, pa.bool_(), mask=same_label == UNKNOWN),
            pa.array(findings.is_cross_P[rows]),
        ]
        yield pa.table(columns, schema=AUDITED_PAIRS)
