"""Scoring runs without Ray and without a model: the first byte of a file decides its row."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.config import ScoreConfig, VerifyConfig
from catsdogs.progress import Progress, silent
from catsdogs.schema import PREDICTIONS, read_table
from catsdogs.score import verify
from catsdogs.score.pipeline import run_pipeline
from catsdogs.score.plan import PendingShard
from catsdogs.score.run_files import RunSettings

CLASS_NAMES = ["a", "b"]
RUN_SETTINGS = RunSettings({"class_names": CLASS_NAMES, "model_sha256": "0" * 64}, {"catsdogs.model_sha256": "0" * 64})
EXTRA = pa.schema(
    [
        ("shard", pa.int32()),
        ("version", pa.string()),
        ("retries", pa.int32()),
        ("read_s", pa.float32()),
        ("decode_s", pa.float32()),
        ("device_precision", pa.string()),
        ("model_s", pa.float32()),
    ]
)
COLUMNS = pa.schema([*PREDICTIONS, *EXTRA])


class ByteClassifier:
    """Predicts the class of a file from its first byte, two rows at a time; `paths` are those that it read."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, shards: Sequence[PendingShard]) -> Iterator[pa.Table]:
        for shard in shards:
            rows = read_table(storage.read_bytes(shard.uri)).to_pylist()
            for start in range(0, len(rows), 2):
                yield pa.Table.from_pylist([self._row(row) for row in rows[start : start + 2]], schema=COLUMNS)

    def _row(self, file: dict[str, Any]) -> dict[str, Any]:
        self.paths.append(file["path"])
        fetched = storage.fetch([storage.Entry(file["path"], file["size_bytes"], file["version"])])[0]
        row = {"path": file["path"], "status": fetched.status, "error": fetched.error, "shard": file["shard"]}
        row |= {"retries": 0, "read_s": 0.0, "decode_s": 0.0, "device_precision": "by hand", "model_s": 0.0}
        row |= {"size_bytes": file["size_bytes"], "version": fetched.version or file["version"]}
        if fetched.content is not None:
            index = fetched.content[0] % 2
            prob = hashlib.sha256(fetched.content).digest()[0] / 512 + 0.5
            probs = [1 - prob, prob] if index else [prob, 1 - prob]
            row |= {"label": CLASS_NAMES[index], "index": index, "prob": prob, "probs": probs}
            row["size_bytes"] = len(fetched.content)
        return row


def build_config(source: object, output: object, **settings: Any) -> ScoreConfig:
    """Build the settings of a small run: 3 rows a part."""
    defaults: dict[str, Any] = {"checkpoint": "none", "shard_size": 3}
    return ScoreConfig(input=str(source), output=str(output), **(defaults | settings))


def run_scoring(
    source: object,
    output: object,
    run_settings: RunSettings = RUN_SETTINGS,
    classifier: ByteClassifier | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Score; return the summary, and the names of the files that were read."""
    classifier = classifier or ByteClassifier()
    summary = run_pipeline(build_config(source, output, **settings), run_settings, classifier, progress)
    return summary, sorted(path.rpartition("/")[2] for path in classifier.paths)


def read_rows(output: str) -> dict[str, dict[str, Any]]:
    """Read the rows of all parts by path; no path may come twice."""
    names = [name for name in storage.list_names(output) if name.startswith("part-")]
    rows = [row for name in names for row in read_table(storage.read_bytes(f"{output}/{name}")).to_pylist()]
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


def check_output(output: str, num_rows: int) -> None:
    """Check an output with `verify`, and that it has no unknown files."""
    assert verify(VerifyConfig(output=output))["rows"] == num_rows == len(read_rows(output))
    known = {"_SUCCESS", "_manifest", "_report.html", "_run.json", "_stats", "_summary.json"}
    assert {name for name in storage.list_names(output) if not name.startswith("part-")} == known
    assert not [name for name in storage.list_names(f"{output}/_manifest") if name.startswith(".")]
    assert storage.list_names(f"{output}/_manifest/_redo") == []


def write_images(folder: Path, **contents: str) -> None:
    """Write files `NAME.jpg`."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_text(content)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Read inode and modification time of every file under a folder."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def wait_for_commit(output: Path, shard: int) -> None:
    """Wait until a part and its record are written."""
    deadline = time.monotonic() + 30
    while not (output / "_stats" / f"part-{shard:05}.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_summary(output: Path) -> dict[str, Any]:
    """Read `_summary.json`."""
    summary: dict[str, Any] = json.loads((output / "_summary.json").read_text())
    return summary


def part_names(output: Path, shard: int) -> list[str]:
    """Read the names of a part's files."""
    return [Path(path).name for path in pq.read_table(output / f"part-{shard:05}.parquet")["path"].to_pylist()]
