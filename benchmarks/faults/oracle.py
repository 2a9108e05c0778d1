"""Compare an output with the expected one: one row for every listed file, equal to the row without faults."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

KNOWN = {"_SUCCESS", "_summary.json", "_run.json", "_report.html", "_manifest", "_stats"}
TOLERANCE = 1e-3  # of probabilities of the stock pipelines, whose batches differ from run to run


class Row(NamedTuple):
    """The columns of a row that are compared. Rows of the stock pipelines have no status."""

    status: str | None
    label: str | None
    prob: str | None


Rows = dict[str, Row]


@dataclass
class Found:
    """The content of an output; rows with their path relative to the input, duplicates included."""

    rows: list[tuple[str, Row]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    success: bool = False
    num_bytes: int = 0

    def by_path(self) -> Rows:
        """Return the last row of each path."""
        return dict(self.rows)


@dataclass
class Verdict:
    """The differences between an output and the expected one."""

    lost: int
    doubled: int
    wrong: int
    problems: list[str]
    wrong_rows: list[str]

    @property
    def right(self) -> bool:
        """Whether there is no difference."""
        return not (self.lost or self.doubled or self.wrong or self.problems)


def read_output(files: Mapping[str, bytes], root: str) -> Found:
    """Read every file of an output; paths of its rows become relative to `root`."""
    found = Found(success="_SUCCESS" in files, num_bytes=sum(-(-len(body) // 4096) * 4096 for body in files.values()))
    for name, content in sorted(files.items()):
        top, *below = name.split("/")
        if top.startswith("_") or below:
            known = top in KNOWN and not any(part.startswith(".") for part in below)
            found.unexpected += [] if known else [name]
            if name.endswith(".parquet") and _read_table(content) is None:
                found.unreadable.append(name)
        elif not name.endswith(".parquet") or name.startswith("."):
            found.unexpected.append(name)
        elif (table := _read_table(content)) is None:
            found.unreadable.append(name)
        else:
            found.rows += [(_relative_to(row["path"], root), _to_row(row)) for row in table.to_pylist()]
    return found


def judge(found: Found, names: Iterable[str], expected: Rows, ours: bool, not_judged: Iterable[str] = ()) -> Verdict:
    """Compare an output with the expected rows."""
    counts, listed, last = Counter(path for path, _ in found.rows), set(names), found.by_path()
    lost = listed - counts.keys()
    unlisted = counts.keys() - listed
    doubled = sum(count - 1 for count in counts.values())
    judged = (counts.keys() & listed) - set(not_judged)
    rows_wrong = {path for path, row in found.rows if path in judged and not _is_same(row, expected[path], ours)}
    wrong = sorted(rows_wrong | unlisted)
    problems = [f"{name} cannot be read" for name in found.unreadable]
    if ours:
        problems += [f"{name} should not be there" for name in found.unexpected]
        equal = digest(last, judged) == digest(expected, judged) and judged == listed - set(not_judged)
        is_complete = equal and not (lost or doubled or wrong or problems)
        if not is_complete and not (lost or doubled or wrong or problems):
            problems.append("another sha256 than without faults")
        if found.success != is_complete:
            problems.append("_SUCCESS is there" if found.success else "no _SUCCESS")
    details = [f"{path}: {last[path]} not {expected.get(path)}" for path in wrong[:5]]
    return Verdict(len(lost), doubled, len(wrong), problems, details)


def digest(rows: Rows, paths: Iterable[str]) -> str:
    """Hash rows in the order of their paths."""
    hashed = hashlib.sha256()
    for path in sorted(paths):
        hashed.update(repr((path, *rows[path])).encode())
    return hashed.hexdigest()


def _read_table(content: bytes) -> pa.Table | None:
    try:
        return pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError):
        return None


def _relative_to(path: str, root: str) -> str:
    for start in (f"{root}/", f"{root.removeprefix('s3://')}/"):  # Ray's read_images leaves the scheme out
        if path.startswith(start):
            return path[len(start) :]
    return path


def _to_row(row: dict[str, Any]) -> Row:
    label, prob = row.get("label"), row.get("prob")
    no_prob = prob is None or math.isnan(prob)
    return Row(row.get("status"), label, None if no_prob else f"{prob:.4f}")


def _is_same(row: Row, expected: Row, ours: bool) -> bool:
    if ours or None in (row.prob, expected.prob):
        return row == expected
    close = abs(float(str(row.prob)) - float(str(expected.prob))) <= TOLERANCE
    return close and (row.status, row.label) == (expected.status, expected.label)
