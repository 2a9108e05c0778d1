"""The files that describe a scoring run: `_run.json` at its start, `_summary.json` and `_report.html` at its end."""

import dataclasses
import datetime
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from catsdogs import storage
from catsdogs.checkpoint import CheckpointFiles
from catsdogs.config import PrecisionChoice, ScoreConfig
from catsdogs.decisions import Decisions
from catsdogs.environment import EARLIER, ENVIRONMENT, read_versions, update_environment
from catsdogs.errors import InputError
from catsdogs.lease import LEASE, LeaseClaim
from catsdogs.progress import StageProgress
from catsdogs.schema import OK
from catsdogs.score.examples import Examples
from catsdogs.score.parts import NUM_BINS, count_values
from catsdogs.score.plan import MANIFEST, REPORT, RUN, SUMMARY, Plan, parse_record
from catsdogs.score.shard_checks import Totals

MAX_SHOWN_CHARS = 60  # of a setting in a message
COLUMN_STAGES = ("read", "decode", "model")  # stages whose seconds are columns of the rows


@dataclass(frozen=True)
class RunSettings:
    """What all rows of an output share: `settings` for `_run.json`, `metadata` for the Parquet file of each part."""

    settings: Mapping[str, Any]
    metadata: Mapping[str, str]


def build_run_settings(
    config: ScoreConfig, checkpoint: CheckpointFiles, decisions: Decisions | None = None
) -> RunSettings:
    """Select the settings of a command that determine the rows."""
    settings = {
        "input": config.input,
        "limit": config.limit,
        "shard_size": config.shard_size,
        "max_pixels": config.max_pixels,
        "precision": config.precision,
        "model_sha256": checkpoint.sha256,
        "class_names": list(checkpoint.class_names),
        "preprocessing": dataclasses.asdict(checkpoint.preprocessing),
    }
    if config.save_embeddings:
        settings["save_embeddings"] = True
    metadata = checkpoint.parquet_metadata()
    if decisions is not None:
        settings |= decisions.settings()
        metadata |= {"catsdogs.decisions": json.dumps(decisions.settings())}
    return RunSettings(settings, metadata)


def check_output(config: ScoreConfig) -> None:
    """Check that the output is empty or, without `--no-resume`, that of an earlier run; InputError if it is not."""
    names = [name for name in storage.list_names(config.output) if not storage.is_temporary(name)]
    if names and not config.resume:
        raise InputError(f"--no-resume: expected an empty or new --output, found files in {config.output}")
    if names not in ([], [LEASE]) and RUN not in names:
        raise InputError(
            f"--output {config.output}: expected an empty or new folder, or that of an earlier scoring run, "
            "found other files; choose another"
        )


def check_run_settings(output: str, run_settings: RunSettings, lease: LeaseClaim) -> None:
    """Compare the settings with `_run.json`, or write it if there is no plan yet; InputError if they differ."""
    uri = storage.join(output, RUN)
    content = json.dumps(dict(run_settings.settings), indent=2).encode()
    found = storage.read_versioned(uri)
    if found is not None and found[0] == content:
        return
    has_plan = storage.list_names(storage.join(output, MANIFEST)) or "part-" in "".join(storage.list_names(output))
    if found is None or not has_plan:
        lease.write(uri, content)
        return
    before = {name: value for name, value in parse_record(uri, found[0]).items() if name not in (ENVIRONMENT, EARLIER)}
    now = parse_record(uri, content)
    differing = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    if differing:
        values = [f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now" for name in differing]
        raise InputError(
            f"--output {output} has rows of another scoring run: {'; '.join(values)}; "
            "repeat its settings, or give another --output"
        )


def record_environment(output: str, device_precision: str, lease: LeaseClaim) -> str:
    """Record in `_run.json` with which versions, device and precision rows are computed.

    Returns:
        What differs from the rows of an earlier command; empty if nothing does.
    """
    uri = storage.join(output, RUN)
    record = parse_record(uri, storage.read_bytes(uri))
    updated, changes = update_environment(record, *_split_device(device_precision))
    if updated != record:
        lease.write(uri, json.dumps(updated, indent=2).encode())
    return changes


def restore_precision(config: ScoreConfig) -> PrecisionChoice:
    """Return the precision of an attempt: `auto` is what it became for the rows of an earlier one."""
    found = storage.read_versioned(storage.join(config.output, RUN))
    if config.precision != "auto" or found is None:
        return config.precision
    recorded = parse_record(config.output, found[0]).get(ENVIRONMENT)
    precision: Any = recorded.get("precision") if isinstance(recorded, dict) else None
    return precision if precision in get_args(PrecisionChoice) else config.precision


def _split_device(device_precision: str) -> tuple[str, str]:
    """Split a description such as `cpu, fp32: probabilities in bf16 differ by 0.05`."""
    device, _, rest = device_precision.partition(", ")
    return device, rest.partition(",")[0].partition(":")[0]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


class RunStats:
    """Counts of the rows that this command scored; `stage_s` has each stage's share of the wall time."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self.num_rows = 0
        self.num_retries = 0
        self.by_status: Counter[str] = Counter()
        self.by_device_precision: Counter[str] = Counter()
        self.stage_s = dict.fromkeys(("list", *COLUMN_STAGES, "write"), 0.0)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._start_s, 1e-9)

    def add(self, rows: pa.Table) -> None:
        """Count rows."""
        self.num_rows += rows.num_rows
        self.by_status.update(count_values(rows["status"]))
        self.by_device_precision.update(count_values(rows["device_precision"]))
        self.num_retries += int(rows["retries"].to_numpy().sum())
        for stage in COLUMN_STAGES:
            self.stage_s[stage] += float(rows[f"{stage}_s"].to_numpy().sum())

    def remove(self, rows: pa.Table) -> None:
        """Subtract rows that will be scored again; their retries and seconds still count."""
        self.num_rows -= rows.num_rows
        self.by_status.subtract(count_values(rows["status"]))
        self.by_device_precision.subtract(count_values(rows["device_precision"]))

    def report(self, num_left: int, num_files: int, note: str = "") -> StageProgress:
        """Build the progress of the run; `note` comes last."""
        rate = max(self.num_rows, 1) / self.seconds
        failures = self.by_status | Counter(retries=self.num_retries)
        notes = [f"{rate:.1f} img/s"]
        notes += [f"{name} {count:,}" for name, count in sorted(failures.items()) if name != OK and count]
        notes += [f"ETA {datetime.timedelta(seconds=round(num_left / rate))}", *([note] if note else [])]
        return StageProgress("score", num_files - num_left, num_files, "  ".join(notes))

    def summarize(self) -> dict[str, Any]:
        """Build the entries of `_summary.json` about this command; the busiest stage is `limited_by`."""
        return {
            "scored": self.num_rows,
            "images_per_s": round(self.num_rows / self.seconds, 2),
            "seconds": round(self.seconds, 2),
            "retries": self.num_retries,
            "stage_seconds": {stage: round(value, 2) for stage, value in self.stage_s.items()},
            "limited_by": max(self.stage_s, key=lambda stage: self.stage_s[stage]),
            "device_precisions": dict(sorted((+self.by_device_precision).items())),
        }


def build_summary(plan: Plan, totals: Totals, stats: RunStats, run_settings: RunSettings) -> dict[str, Any]:
    """Build the content of `_summary.json`."""
    settings = run_settings.settings
    return (
        totals.summarize(plan, settings["class_names"])
        | ({"thresholds": settings["calibration"]["thresholds"]} if "calibration" in settings else {})
        | {"other_files": dict(sorted(plan.other_files.items()))}
        | stats.summarize()
        | {"versions": {"python": platform.python_version(), **read_versions()}}
        | {"model_sha256": settings["model_sha256"]}
    )


def write_summary(
    config: ScoreConfig, summary: dict[str, Any], totals: Totals, examples: Examples | None, lease: LeaseClaim
) -> None:
    """Write `_summary.json` and `_report.html`."""
    from catsdogs import report  # not at the top: matplotlib would add a second to every start

    facts = {
        "images": f"{summary['rows']:,}",
        "classified": f"{summary['by_status'].get(OK, 0):,}",
        "img/s": f"{summary['images_per_s']:.1f}",
        "seconds": f"{summary['seconds']:,.0f}",
    }
    settings = {"input": config.input, "checkpoint": config.checkpoint, "output": config.output}
    sections = [
        report.facts(facts),
        report.label_counts(summary["by_label"]),
        report.confidence(totals.histogram, np.linspace(0, 1, NUM_BINS + 1).tolist()),
        *([] if examples is None else [report.class_examples(examples)]),
        report.failures(summary["by_status"], totals.examples),
        report.settings(settings | {"model_sha256": summary["model_sha256"]}),
    ]
    if totals.by_decision is not None:
        counts = report.decision_counts(summary["by_label"], totals.by_decision, summary["thresholds"])
        sections.insert(2, counts)
    page = report.page("Scoring", sections, subtitle=config.input)
    lease.write(storage.join(config.output, SUMMARY), json.dumps(summary, indent=2).encode())
    lease.write(storage.join(config.output, REPORT), page.encode())
