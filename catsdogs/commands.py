"""Run each command, and print the lines of its result."""

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catsdogs.auditing import audit
from catsdogs.comparison import compare
from catsdogs.config import (
    AuditConfig,
    CompareConfig,
    DemoConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    ReviewConfig,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
)
from catsdogs.display import Display, print_error, print_result
from catsdogs.errors import CatsdogsError
from catsdogs.evaluate import evaluate
from catsdogs.exporting import export
from catsdogs.reviewing import review
from catsdogs.score import score, verify
from catsdogs.text import format_line
from catsdogs.train import train

MAIN_ISSUES = (
    "corrupt",
    "leakage",
    "conflict",
    "duplicate",
    "near_duplicate",
    "suspect_label",
)  # the others are odd images

logger = logging.getLogger(__name__)


def fail(reason: object, code: int) -> int:
    """Print why a command failed, in one line; return its exit code."""
    if isinstance(reason, CatsdogsError):
        logger.debug("the command failed", exc_info=reason)
    print_error(format_line(f"catsdogs: {reason}"))
    return code


def _demo(config: DemoConfig, display: Display) -> int:
    from catsdogs.demo import demo

    print_result(demo(config, display))
    return 0


def _download(config: DownloadConfig, display: Display) -> int:
    from catsdogs.download import download

    root = download(config.url, Path(config.output), display)
    print_result(f"{root}: ready for catsdogs train --data-dir {shlex.quote(str(root))}")
    return 0


def _train(config: TrainConfig, display: Display) -> int:
    result = train(config, display)
    print_result(
        f"best validation accuracy {result.val_accuracy:.4f} in epoch {result.best_epoch}\n"
        f"checkpoint {result.uri}/best, report {result.uri}/report.html"
    )
    return 0


def _evaluate(config: EvaluateConfig, display: Display) -> int:
    metrics = evaluate(config, display)
    low, high = metrics["accuracy_interval_95"]
    print_result(json.dumps({"accuracy": metrics["accuracy"], "n": metrics["n"], "failed": metrics["failed"]}))
    print_result(
        f"accuracy {metrics['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f}); "
        f"all numbers in {config.output}/metrics.json"
    )
    if groups := metrics.get("groups"):
        low, high = metrics["group_accuracy_interval_95"]
        mean = f"accuracy {metrics['group_accuracy']:.4f} as the mean over {groups:,} groups"
        print_result(f"{mean} (95% interval {low:.4f} to {high:.4f})")
    if decisions := metrics.get("decisions"):
        print_result(_describe_decisions(decisions))
    if metrics["failed"] == metrics["n"]:
        return _fail_rows(metrics["failed"], metrics["n"])
    return 0


def _score(config: ScoreConfig, display: Display) -> int:
    summary = score(config, display)
    failed = summary["rows"] - summary["by_status"].get("ok", 0)
    print_result(
        f"{summary['rows']:,} rows in {config.output}, {failed:,} not classified (columns status and error); "
        f"last run: {summary['scored']:,} rows at {summary['images_per_s']:.1f} img/s, "
        f"slowest stage {summary['limited_by']}"
    )
    if "accepted" in summary:
        print_result(_describe_decisions(summary))
    if failed == summary["rows"] or failed > config.max_error_rate * summary["rows"]:
        return _fail_rows(failed, summary["rows"])
    return 0


def _describe_decisions(counts: dict[str, Any]) -> str:
    precision = f", of which {counts['precision']:.4f} are correct" if counts.get("precision") is not None else ""
    return f"{counts['accepted']:,} accepted{precision}; {counts['review']:,} to review"


def _fail_rows(failed: int, total: int) -> int:
    return fail(f"{failed:,} of {total:,} images were not classified: see the columns status and error", 3)


def _verify(config: VerifyConfig, display: Display) -> int:
    totals = verify(config, display)
    print_result(
        f"{totals['rows']:,} rows for {totals['listed']:,} listed files in {config.output}: none missing, none twice"
    )
    return 0


def _audit(config: AuditConfig, display: Display) -> int:
    summary = audit(config, display)
    by_issue = {name: count for name, count in summary["by_issue"].items() if count}
    counts = [f"{by_issue[name]:,} {name}" for name in MAIN_ISSUES if name in by_issue]
    odd = sum(count for name, count in by_issue.items() if name not in MAIN_ISSUES)
    counts += [f"{odd:,} odd"] if odd else []
    print_result(f"{summary['files']:,} files: {', '.join(counts) or 'no issues'}; see {config.output}/report.html")
    if unpaired := summary["not_paired"]["buckets"]:
        limits = ", ".join(f"over {limit:,} {kind}" for kind, limit in summary["not_paired"]["max_images"].items())
        print_result(
            f"{unpaired:,} sets of too many similar images ({limits}) were not paired: see not_paired in audit.json"
        )
    if groups := summary["groups_in_several_splits"]:
        print_result(f"{groups:,} groups are in more than one split, which train refuses: see audit.json")
    if summary["excluded"]:
        print_result(f"to train without {summary['excluded']:,} of them, add --exclude {config.output}/exclude.csv")
    if found := [f"{by_issue[name]:,} {name}" for name in config.fail_on_issues if name in by_issue]:
        return fail(f"--fail-on: found {', '.join(found)}", 3)
    return 0


def _compare(config: CompareConfig, display: Display) -> int:
    record = compare(config, display)
    figures = {name: value for name, value in record["figures"].items() if value is not None}
    print_result(json.dumps(figures))
    print_result(f"all numbers in {config.output}/compare.json, report {config.output}/report.html")
    if holding := [f"{row['condition']} ({row['value']:.4g})" for row in record["conditions"] if row["holds"]]:
        return fail(f"--fail-if: {', '.join(holding)}: see {config.output}/changes.parquet", 3)
    return 0


def _review(config: ReviewConfig, display: Display) -> int:
    counts = review(config, display)
    print_result(
        f"{counts['picked']:,} of {counts['candidates']:,} candidates in {config.output}/review.html: label them in a "
        "browser, save labels.csv, and train with --labels labels.csv"
    )
    return 0


def _export(config: ExportConfig, display: Display) -> int:
    record = export(config, display)
    print_result(
        f"{config.format} graph in {config.output}: probabilities of the reference images differ by at most "
        f"{record['max_difference']:.2g} from those of score"
    )
    return 0


COMMANDS: dict[type, Callable[[Any, Display], int]] = {
    DemoConfig: _demo,
    DownloadConfig: _download,
    TrainConfig: _train,
    EvaluateConfig: _evaluate,
    ScoreConfig: _score,
    VerifyConfig: _verify,
    AuditConfig: _audit,
    ReviewConfig: _review,
    CompareConfig: _compare,
    ExportConfig: _export,
}
