"""An output against what it should be: every listed file one row, the same row as without faults, nothing else."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

KNOWN = {"_SUCCESS", "_summary.json", "_run.json", "_report.html", "_manifest", "_stats"}
TOLERANCE = 1e-3  # of a probability of the stock runs, whose batches differ from run to run


class Row(NamedTuple):
    """What counts of a row. A stock run has no status: no label, no status."""

    status: str | None
    label: str | None
    prob: str | None


Rows = dict[str, Row]


@dataclass
class Found:
    """What stands in an output: rows by path relative to the input, as often as they stand there."""

    rows: list[tuple[str, Row]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    success: bool = False
    num_bytes: int = 0

    def by_path(self) -> Rows:
        """Give the last row of each path."""
        return dict(self.rows)


@dataclass
class Verdict:
    """What is wrong with an output."""

    lost: int
    doubled: int
    wrong: int
    problems: list[str]
    wrong_rows: list[str]

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.wrong or self.problems)


def read(files: Mapping[str, bytes], root: str) -> Found:
    """Read every file of an output; root is what its paths are relative to."""
    found = Found(success="_SUCCESS" in files, num_bytes=sum(-(-len(body) // 4096) * 4096 for body in files.values()))
    for name, content in sorted(files.items()):
        top, *below = name.split("/")
        if top.startswith("_") or below:
            known = top in KNOWN and not any(part.startswith(".") for part in below)
            found.strange += [] if known else [name]
            if name.endswith(".parquet") and _table(content) is None:
                found.unreadable.append(name)
        elif not name.endswith(".parquet") or name.startswith("."):
            found.strange.append(name)
        elif (table := _table(content)) is None:
            found.unreadable.append(name)
        else:
            found.rows += [(_relative(row["path"], root), _row(row)) for row in table.to_pylist()]
    return found


def judge(found: Found, names: Iterable[str], expected: Rows, ours: bool, not_judged: Iterable[str] = ()) -> Verdict:
    """Compare an output with the rows it should have."""
    counts, listed, last = Counter(path for path, _ in found.rows), set(names), found.by_path()
    lost = listed - counts.keys()
    strangers = counts.keys() - listed
    doubled = sum(count - 1 for count in counts.values())
    judged = (counts.keys() & listed) - set(not_judged)
    rows_wrong = {path for path, row in found.rows if path in judged and not _same(row, expected[path], ours)}
    wrong = sorted(rows_wrong | strangers)
    problems = [f"{name} cannot be read" for name in found.unreadable]
    if ours:
        problems += [f"{name} should not be there" for name in found.strange]
        equal = digest(last, judged) == digest(expected, judged) and judged == listed - set(not_judged)
        holds = equal and not (lost or doubled or wrong or problems)
        if not holds and not (lost or doubled or wrong or problems):
            problems.append("another sha256 than without faults")
        if found.success != holds:
            problems.append("_SUCCESS is there" if found.success else "no _SUCCESS")
    details = [f"{path}: {last[path]} not {expected.get(path)}" for path in wrong[:5]]
    return Verdict(len(lost), doubled, len(wrong), problems, details)


def digest(rows: Rows, paths: Iterable[str]) -> str:
    """Hash rows, in order of path."""
    hashed = hashlib.sha256()
    for path in sorted(paths):
        hashed.update(repr((path, *rows[path])).encode())
    return hashed.hexdigest()


def _table(content: bytes) -> pa.Table | None:
    try:
        return pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError):
        return None


def _relative(path: str, root: str) -> str:
    for start in (f"{root}/", f"{root.removeprefix('s3://')}/"):  # Ray's read_images leaves the scheme out
        if path.startswith(start):
            return path[len(start) :]
    return path


def _row(row: dict[str, Any]) -> Row:
    label, prob = row.get("label"), row.get("prob")
    no_prob = prob is None or math.isnan(prob)
    return Row(row.get("status"), label, None if no_prob else f"{prob:.4f}")


def _same(row: Row, expected: Row, ours: bool) -> bool:
    if ours or None in (row.prob, expected.prob):
        return row == expected
    close = abs(float(str(row.prob)) - float(str(expected.prob))) <= TOLERANCE
    return close and (row.status, row.label) == (expected.status, expected.label)
