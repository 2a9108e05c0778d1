"""score(): from a folder or bucket to Parquet, stage by stage. Calls, with the file of each:

    score
    └── run_pipeline
        ├── check_output                     run_files.py          empty, or the output of an earlier run?
        ├── Lease                            ../lease.py           one driver at a time
        ├── check_run_settings               run_files.py          same model and settings as before?
        ├── update_plan                      listing.py            1 list: --input -> plan.py, the files of each part
        ├── score_pending_shards                                   until no shard of the plan is pending:
        │   ├── predict_rows
        │   │   ├── DecodeForInference       ../data/decode.py     2 read and decode: files -> pixels
        │   │   │   ├── storage.fetch_ahead  ../storage/fetching.py  file -> bytes, or the status of a failed read
        │   │   │   └── images.decode_image  ../images/decode.py     bytes -> pixels, or the status of a bad image
        │   │   └── Classifier               ../classify.py        3 classify: pixels -> label and probabilities
        │   └── PartWriter                   parts.py              4 write: rows -> parts, each committed whole
        ├── audit                            audit.py              5 audit: every listed file has exactly one row
        │   ├── check_range                  shard_checks.py       in threads, or for a large plan in Ray tasks
        │   └── find_repeated                listing_checks.py     the same
        └── write_summary                    run_files.py          _summary.json, _report.html; then _SUCCESS

The driver is the process that runs the command. Stages 2 and 3 run in Ray's processes, and 5 for a large plan; the
others run in the driver.
It may die at any moment: the same command resumes from what was written.

A shard is a group of files, listed in its manifest; a part is the Parquet file of their rows.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import data, storage
from catsdogs.checkpoint import CheckpointFiles, read_checkpoint
from catsdogs.classify import ClassifyOptions, add_classifier, iter_predictions
from catsdogs.config import ScoreConfig
from catsdogs.errors import CatsdogsError, RunError
from catsdogs.lease import Lease, LeaseClaim
from catsdogs.progress import Message, Progress, StallReporter, silent
from catsdogs.ray_errors import RetryableError, unwrap_ray_error
from catsdogs.score.audit import audit
from catsdogs.score.listing import update_plan
from catsdogs.score.parts import PASSTHROUGH_COLUMNS, PartWriter
from catsdogs.score.plan import MANIFEST, RESCORE, STATS, SUCCESS, SUMMARY, PendingShard, Plan, parse_record
from catsdogs.score.run_files import (
    RunSettings,
    RunStats,
    build_run_settings,
    build_summary,
    check_output,
    check_run_settings,
    record_environment,
    restore_precision,
    write_summary,
)
from catsdogs.start import start_ray

logger = logging.getLogger(__name__)
MAX_ATTEMPTS_WITHOUT_COMMIT = 3  # in a row

# Takes URIs of manifests and yields the rows of their files, in any order: the columns of the output,
# PASSTHROUGH_COLUMNS, `device_precision` and `model_s`.
Predict = Callable[[Sequence[str]], Iterator[pa.Table]]


def score(config: ScoreConfig, progress: Progress = silent) -> dict[str, Any]:
    """Classify every listed file whose row is missing, outdated, or requested again by `--retry-failed`.

    Returns:
        The content of `_summary.json`.

    Raises:
        InputError: the input, the checkpoint or the output cannot be used.
        RunError: the run failed; finished parts are kept, and the same command resumes.
    """
    config = dataclasses.replace(
        config,
        input=storage.absolute(config.input),
        checkpoint=storage.absolute(config.checkpoint),
        output=storage.absolute(config.output),
    )
    checkpoint = read_checkpoint(config.checkpoint)
    predict = partial(predict_rows, config, checkpoint, progress)
    return run_pipeline(config, build_run_settings(config, checkpoint), predict, progress)


def run_pipeline(
    config: ScoreConfig, run_settings: RunSettings, predict: Predict, progress: Progress
) -> dict[str, Any]:
    """List the input, and finish the plan of the output; return the content of `_summary.json`.

    Args:
        predict: stages 2 and 3: `predict_rows`, or in tests a function without Ray and model.

    Raises:
        InputError: the input or the output cannot be used.
        RunError: the run failed; finished parts are kept.
    """
    check_output(config)
    kept = f"finished parts are kept in {config.output}; run the same command to resume"
    try:
        with Lease(config.output, progress, "scoring run", "--output") as lease:
            check_run_settings(config.output, run_settings, lease)
            return _run_stages(config, run_settings, predict, lease, progress)
    except RunError as error:
        raise RunError(f"{error}; {kept}") from error
    except Exception as error:
        if not isinstance(error, CatsdogsError):
            error.add_note(f"scoring failed because of a bug in catsdogs; {kept}")
        raise


def _run_stages(
    config: ScoreConfig, run_settings: RunSettings, predict: Predict, lease: LeaseClaim, progress: Progress
) -> dict[str, Any]:
    for folder in ((), (MANIFEST,), (STATS,), (MANIFEST, RESCORE)):
        storage.remove_temporaries(storage.join(config.output, *folder))
    stats = RunStats()
    plan = Plan.load(config.output)

    update_plan(plan, config, lease, progress)
    with PartWriter(plan, run_settings.metadata, lease) as writer:
        pending = writer.pending_shards()
        stats.stage_s["list"] = stats.seconds
        success_uri = storage.join(config.output, SUCCESS)
        if not pending and storage.read_versioned(success_uri) is not None:
            progress(Message(f"nothing to do: every listed file has its row in {config.output}"))
            summary_uri = storage.join(config.output, SUMMARY)
            return parse_record(summary_uri, storage.read_bytes(summary_uri))

        storage.remove(success_uri)
        score_pending_shards(pending, predict, writer, stats, progress)
        stats.stage_s["write"] = writer.write_s

        totals = audit(plan, run_settings.settings, progress, data.map_in_tasks if data.can_run_tasks() else None)
        writer.write_records(totals.stale)

    summary = build_summary(plan, totals, stats, run_settings)
    write_summary(config, summary, totals, lease)
    lease.write(success_uri, b"")
    return summary


def score_pending_shards(
    pending: Mapping[int, PendingShard], predict: Predict, writer: PartWriter, stats: RunStats, progress: Progress
) -> None:
    """Predict and write until no shard is pending; RunError if several attempts in a row finished no part."""
    if pending:
        _report_pending(writer.plan, pending, progress)
    num_failures: Counter[int] = Counter()  # attempts that left a shard incomplete: it goes last in the next
    attempts_without_commit = 0
    while pending:
        num_committed = writer.num_committed
        order = sorted(pending, key=lambda shard: (num_failures[shard], shard))
        reason = _attempt({shard: pending[shard] for shard in order}, predict, writer, stats, progress)
        for shard, tables in writer.drop_incomplete().items():
            num_failures[shard] += 1
            for rows in tables:
                stats.remove(rows)
        attempts_without_commit = 0 if writer.num_committed > num_committed else attempts_without_commit + 1
        if attempts_without_commit == MAX_ATTEMPTS_WITHOUT_COMMIT:
            raise RunError(f"{attempts_without_commit} attempts in a row finished no part, the last one: {reason}")
        pending = writer.pending_shards()
        if pending:
            progress(Message(f"{reason}: trying again, {len(pending)} parts are pending"))


def _report_pending(plan: Plan, pending: Mapping[int, PendingShard], progress: Progress) -> None:
    num_files = sum(shard.num_rows for shard in pending.values())
    num_parts = len(plan.sizes)
    finished = f", {num_parts - len(pending)} of {num_parts} parts are finished" if len(pending) < num_parts else ""
    progress(Message(f"{num_files:,} of {plan.num_files:,} files to score{finished}"))


def _attempt(
    pending: Mapping[int, PendingShard], predict: Predict, writer: PartWriter, stats: RunStats, progress: Progress
) -> str:
    """Predict and write once; return the reason for missing rows, which counts only if shards remain pending."""
    num_left, num_files = sum(shard.num_rows for shard in pending.values()), writer.plan.num_files
    try:
        for rows in _unwrap_errors(predict, [shard.uri for shard in pending.values()]):
            seen = set(stats.by_device_precision)
            if not seen:
                _record_environment(rows, writer, progress)
            stats.add(rows)
            writer.add(rows, pending)
            num_left -= rows.num_rows
            for device_precision in stats.by_device_precision.keys() - seen:
                progress(Message(f"classifying on {device_precision}"))
            progress(stats.report(num_left, num_files))
    except RetryableError as failure:
        return str(failure)
    return "rows are missing"


def _record_environment(rows: pa.Table, writer: PartWriter, progress: Progress) -> None:
    """Record how the first rows of this command were computed, before a part has them."""
    output = writer.plan.output
    changes = record_environment(output, rows["device_precision"][0].as_py(), writer.lease)
    if changes:
        progress(Message(f"results may differ slightly from those of the parts in {output}: {changes}"))


def _unwrap_errors(predict: Predict, manifest_uris: Sequence[str]) -> Iterator[pa.Table]:
    """Predict, and unwrap the exceptions of stages 2 and 3: only these can be retryable."""
    try:
        yield from predict(manifest_uris)
    except Exception as error:
        logger.debug("an attempt failed", exc_info=True)
        cause = unwrap_ray_error(error)
        raise cause from (error.__cause__ if cause is error else None)


def predict_rows(
    config: ScoreConfig, checkpoint: CheckpointFiles, progress: Progress, manifest_uris: Sequence[str]
) -> Iterator[pa.Table]:
    """Read, decode and classify the files of manifests with Ray Data; start Ray if it does not run."""
    start_ray()
    config = dataclasses.replace(config, precision=restore_precision(config))
    options = ClassifyOptions.from_config(config, checkpoint, allow_gpu_jpegs=True)
    progress(Message(options.describe_start()))
    decode_stage = options.build_decode_stage(config.max_pixels)
    decoded = data.read_and_decode_manifests(manifest_uris, decode_stage, options.cpus.decode)
    classified = add_classifier(decoded, decode_stage, options, PASSTHROUGH_COLUMNS, config.save_embeddings)
    stalls = StallReporter(progress, options.describe_wait)
    with data.quiet_ray_loggers(), data.without_cluster_actors(), stalls:
        options.wait_for_device()
        for rows in stalls.watch(iter_predictions(classified)):
            yield _divide_seconds(rows, options.parallelism)


def _divide_seconds(rows: pa.Table, parallelism: Mapping[str, int]) -> pa.Table:
    """Convert seconds per process to a share of the stage's wall time."""
    for stage, num_processes in parallelism.items():
        name = f"{stage}_s"
        seconds = pc.divide(rows[name], pa.scalar(num_processes, pa.float32()))
        rows = rows.set_column(rows.schema.get_field_index(name), name, seconds)
    return rows
