"""Results as one line of JSON per run, so that an interrupted table is resumed."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.faults.oracle import Row, Rows


@dataclass
class Result:
    """The result of one run under one fault."""

    fault: str
    pipeline: str
    run: int
    injected: int
    lost: int
    doubled: int
    wrong: int
    images_read: int
    wall_s: float
    codes: list[int]
    cut: bool
    right: bool
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    when: str = ""
    revision: str = ""


class Results:
    """The results in a work folder, and the reference of each pipeline: the rows of its first run without faults."""

    def __init__(self, work: Path) -> None:
        self._path = work / "results.jsonl"
        self.work = work
        self.runs: list[Result] = []
        if self._path.exists():
            self.runs = [Result(**json.loads(line)) for line in self._path.read_text().splitlines()]

    def add(self, result: Result) -> None:
        """Store a result."""
        self.runs.append(result)
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")

    def copy_to(self, path: Path) -> None:
        """Copy the results to a file."""
        if self.runs:
            path.write_text(self._path.read_text())

    def find(self, fault: str, pipeline: str) -> list[Result]:
        """Find the results of one row of the table."""
        return [run for run in self.runs if (run.fault, run.pipeline) == (fault, pipeline)]

    def wall_s(self, fault: str, pipeline: str) -> float | None:
        """Return the median wall time of the runs of a row."""
        runs = self.find(fault, pipeline)
        return median(run.wall_s for run in runs) if runs else None

    def reference(self, pipeline: str) -> tuple[Rows, int] | None:
        """Read a pipeline's rows without faults, and the bytes of that output on a disk."""
        path = self._reference_path(pipeline)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        return {name: Row(*row) for name, row in record["rows"].items()}, record["num_bytes"]

    def save_reference(self, pipeline: str, rows: Rows, num_bytes: int) -> None:
        """Store the reference of a pipeline."""
        self._reference_path(pipeline).write_text(json.dumps({"rows": rows, "num_bytes": num_bytes}))

    def _reference_path(self, pipeline: str) -> Path:
        return self.work / f"reference-{pipeline}.json"
