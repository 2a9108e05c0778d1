"""A scoring whose labeller needs no model and no Ray: a file's first byte decides its row."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import storage
from catsdogs.config import ScoreConfig, VerifyConfig
from catsdogs.schema import PREDICTIONS, read_table
from catsdogs.score.run import RunSettings, run
from catsdogs.score.verify import verify

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


class Scorer:
    """Labels files by their content, two rows at a time; keeps the paths that it read."""

    def __init__(self) -> None:
        self.parallelism = {"read": 1, "decode": 1, "model": 1}
        self.paths: list[str] = []

    def __call__(self, uris: Sequence[str]) -> Iterator[pa.Table]:
        for uri in uris:
            rows = read_table(storage.read_bytes(uri)).to_pylist()
            for start in range(0, len(rows), 2):
                yield pa.Table.from_pylist([self._row(row) for row in rows[start : start + 2]], schema=COLUMNS)

    def _row(self, file: dict) -> dict:
        self.paths.append(file["path"])
        fetched = storage.fetch([storage.Entry(file["path"], file["size_bytes"], file["version"])])[0]
        row = {"path": file["path"], "status": fetched.status, "error": fetched.error, "shard": file["shard"]}
        row |= {"retries": 0, "read_s": 0.0, "decode_s": 0.0, "device_precision": "by hand", "model_s": 0.0}
        row |= {"size_bytes": file["size_bytes"], "version": fetched.version or file["version"]}
        if fetched.image_bytes is not None:
            index = fetched.image_bytes[0] % 2
            prob = hashlib.sha256(fetched.image_bytes).digest()[0] / 512 + 0.5
            probs = [1 - prob, prob] if index else [prob, 1 - prob]
            row |= {"label": CLASS_NAMES[index], "index": index, "prob": prob, "probs": probs}
            row["size_bytes"] = len(fetched.image_bytes)
        return row


def config_of(source: object, output: object, **settings: object) -> ScoreConfig:
    """Make the settings of a small scoring: 3 rows a part."""
    defaults = {"checkpoint": "none", "shard_size": 3}
    return ScoreConfig(input=str(source), output=str(output), **(defaults | settings))


def scored(
    source: object, output: object, run_settings: RunSettings = RUN_SETTINGS, **settings: object
) -> tuple[dict, list[str]]:
    """Score; the summary, and the paths whose files were read."""
    scorer = Scorer()
    summary = run(config_of(source, output, **settings), run_settings, scorer, lambda _: None)
    return summary, sorted(scorer.paths)


def read_rows(output: str) -> dict[str, dict]:
    """Read the rows of all parts by path; no path may come twice."""
    names = [name for name in storage.list_names(output) if name.startswith("part-")]
    rows = [row for name in names for row in read_table(storage.read_bytes(f"{output}/{name}")).to_pylist()]
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


def check_output(output: str, num_rows: int) -> None:
    """Hold an output against the proof and against what may lie there."""
    assert verify(VerifyConfig(output=output))["rows"] == num_rows == len(read_rows(output))
    known = {"_SUCCESS", "_manifest", "_report.html", "_run.json", "_stats", "_summary.json"}
    assert {name for name in storage.list_names(output) if not name.startswith("part-")} == known
    assert not [name for name in storage.list_names(f"{output}/_manifest") if name.startswith(".")]
    assert storage.list_names(f"{output}/_manifest/_redo") == []


def fill(folder: Path, **contents: str) -> None:
    """Write files `NAME.jpg`."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_text(content)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Note every file under a folder with its inode and modification time."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def summary_of(output: Path) -> dict:
    return json.loads((output / "_summary.json").read_text())


def part_paths(output: Path, shard: int) -> list[str]:
    """Name the files of a part, without their folder."""
    return [Path(path).name for path in pq.read_table(output / f"part-{shard:05}.parquet")["path"].to_pylist()]
