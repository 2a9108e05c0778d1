"""One line of JSON a run, so that an interrupted table goes on where it was."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.faults.oracle import Row, Rows


@dataclass
class Result:
    """One run under one fault."""

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
    """The runs of a work folder, and the rows of the first run without faults of each pipeline."""

    def __init__(self, work: Path) -> None:
        self._path = work / "results.jsonl"
        self.work = work
        self.runs: list[Result] = []
        if self._path.exists():
            self.runs = [Result(**json.loads(line)) for line in self._path.read_text().splitlines()]

    def add(self, result: Result) -> None:
        """Keep one."""
        self.runs.append(result)
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")

    def copy_to(self, path: Path) -> None:
        """Publish the runs."""
        if self.runs:
            path.write_text(self._path.read_text())

    def of(self, fault: str, pipeline: str) -> list[Result]:
        """List the runs of one row of the table."""
        return [run for run in self.runs if (run.fault, run.pipeline) == (fault, pipeline)]

    def wall_s(self, fault: str, pipeline: str) -> float | None:
        """Give the median wall time of a row's runs."""
        runs = self.of(fault, pipeline)
        return median(run.wall_s for run in runs) if runs else None

    def reference(self, pipeline: str) -> tuple[Rows, int] | None:
        """Give a pipeline's rows without faults, and the bytes of that output on a disk."""
        path = self._reference_path(pipeline)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        return {name: Row(*row) for name, row in record["rows"].items()}, record["num_bytes"]

    def keep_reference(self, pipeline: str, rows: Rows, num_bytes: int) -> None:
        """Store them."""
        self._reference_path(pipeline).write_text(json.dumps({"rows": rows, "num_bytes": num_bytes}))

    def _reference_path(self, pipeline: str) -> Path:
        return self.work / f"reference-{pipeline}.json"
