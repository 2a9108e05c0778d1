"""score(): from a folder or bucket to Parquet, stage by stage. Calls, with the file of each:

    score                                                      reads the checkpoint, finds an image, starts Ray
    └── run_pipeline
        ├── check_output                     run_files.py          empty, or the output of an earlier run?
        ├── Lease                            ../lease.py           one driver at a time
        ├── check_run_settings               run_files.py          same model and settings as before?
        ├── BackgroundListing                background.py         1 list: in a thread
        │   └── PlanUpdate                   listing.py            --input -> plan.py, the files of each part
        ├── score_pending_shards             attempts.py           until all is listed, and no shard is pending:
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from catsdogs import storage
from catsdogs.checkpoint import CheckpointFiles, read_checkpoint
from catsdogs.config import ScoreConfig
from catsdogs.decisions import Decisions, load_decisions
from catsdogs.errors import CatsdogsError, RunError
from catsdogs.images import ImageArray
from catsdogs.lease import Lease, LeaseClaim
from catsdogs.progress import Message, Progress, StallReporter
from catsdogs.score.attempts import Predict, score_pending_shards
from catsdogs.score.audit import ConcurrentMap, audit
from catsdogs.score.background import BackgroundListing
from catsdogs.score.examples import DecodeImages, build_examples
from catsdogs.score.listing import has_images
from catsdogs.score.parts import PASSTHROUGH_COLUMNS, PartWriter
from catsdogs.score.plan import MANIFEST, RESCORE, STATS, SUCCESS, SUMMARY, PendingShard, Plan, parse_record
from catsdogs.score.rescoring import request_rescore_of_failed_rows
from catsdogs.score.run_files import (
    RunSettings,
    RunStats,
    build_run_settings,
    build_summary,
    check_output,
    check_run_settings,
    restore_precision,
    write_summary,
)
from catsdogs.start import import_while_ray_starts


def score(config: ScoreConfig, progress: Progress) -> dict[str, Any]:
    """Classify every listed file whose row is missing or outdated; return the content of `_summary.json`."""
    config = dataclasses.replace(
        config,
        input=storage.absolute(config.input),
        checkpoint=storage.absolute(config.checkpoint),
        output=storage.absolute(config.output),
    )
    checkpoint = read_checkpoint(config.checkpoint)
    decisions = load_decisions(config.min_precision, checkpoint, progress)
    check_output(config)
    if not storage.list_names(config.output) and has_images(config):  # a resumed run may have nothing to score
        import_while_ray_starts("catsdogs.classify")  # before the listing, which imports packages of Ray Data, too
    predict = partial(predict_rows, config, checkpoint, decisions, progress)
    return run_pipeline(
        config, build_run_settings(config, checkpoint, decisions), predict, progress, _decode_thumbnails
    )


def run_pipeline(
    config: ScoreConfig,
    run_settings: RunSettings,
    predict: Predict,
    progress: Progress,
    decode_images: DecodeImages | None = None,
) -> dict[str, Any]:
    """List the input, and finish the plan of the output; return the content of `_summary.json`.

    Args:
        predict: stages 2 and 3: `predict_rows`, or in tests a function without Ray and model.
        decode_images: decodes examples for the report, which has none otherwise.

    Raises:
        InputError: the input or the output cannot be used.
        RunError: the run failed; finished parts are kept.
    """
    check_output(config)
    kept = f"finished parts are kept in {config.output}; run the same command to resume"
    try:
        with Lease(config.output, progress, "scoring run", "--output") as lease:
            check_run_settings(config.output, run_settings, lease)
            return _run_stages(config, run_settings, predict, lease, progress, decode_images)
    except RunError as error:
        raise RunError(f"{error}; {kept}") from error
    except Exception as error:
        if not isinstance(error, CatsdogsError):
            error.add_note(f"scoring failed because of a bug in catsdogs; {kept}")
        raise


def _run_stages(
    config: ScoreConfig,
    run_settings: RunSettings,
    predict: Predict,
    lease: LeaseClaim,
    progress: Progress,
    decode_images: DecodeImages | None,
) -> dict[str, Any]:
    for folder in ((), (MANIFEST,), (STATS,), (MANIFEST, RESCORE)):
        storage.remove_temporaries(storage.join(config.output, *folder))
    stats = RunStats()
    plan = Plan.load(config.output)
    writer = PartWriter(config.output, run_settings.metadata, lease)
    with BackgroundListing(plan, config, lease, progress) as listing, writer:
        if config.retry_failed:
            listing.wait()
            request_rescore_of_failed_rows(plan, lease)
        pending = listing.wait_for_shards(writer)
        success_uri = storage.join(config.output, SUCCESS)
        if not pending and storage.read_versioned(success_uri) is not None:
            progress(Message(f"nothing to do: every listed file has its row in {config.output}"))
            summary_uri = storage.join(config.output, SUMMARY)
            return parse_record(summary_uri, storage.read_bytes(summary_uri))

        storage.remove(success_uri)
        score_pending_shards(pending, listing, predict, writer, stats, progress)
        stats.stage_s["list"], stats.stage_s["write"] = listing.seconds, writer.write_s

        totals = audit(plan, run_settings.settings, progress, _find_map_in_tasks())
        writer.write_records(totals.stale)

    summary = build_summary(plan, totals, stats, run_settings)
    examples = None if decode_images is None else build_examples(plan, summary["by_label"], decode_images)
    write_summary(config, summary, totals, examples, lease)
    lease.write(success_uri, b"")
    return summary


def _decode_thumbnails(paths: Iterable[str]) -> dict[str, ImageArray]:
    """Decode images for the report, with Ray; it may not run yet if every part was finished."""
    data = import_while_ray_starts("catsdogs.data")
    images: dict[str, ImageArray] = data.decode_images(paths, data.THUMBNAIL)
    return images


def _find_map_in_tasks() -> ConcurrentMap | None:
    if not ray.is_initialized():  # every part was finished
        return None
    from catsdogs.data import map_in_tasks  # not at the top: imports Ray Data

    return map_in_tasks


def predict_rows(
    config: ScoreConfig,
    checkpoint: CheckpointFiles,
    decisions: Decisions | None,
    progress: Progress,
    shards: Sequence[PendingShard],
) -> Iterator[pa.Table]:
    """Read, decode and classify the files of shards with Ray Data; start Ray if it does not run."""
    import_while_ray_starts("catsdogs.classify")
    from catsdogs import data  # not at the top: import Ray Data, which the checks of the input do not need
    from catsdogs.classify import ClassifyOptions, add_classifier, iter_predictions

    config = dataclasses.replace(config, precision=restore_precision(config))
    options = ClassifyOptions.from_config(config, checkpoint, allow_gpu_jpegs=True)
    progress(Message(options.describe_start()))
    decode_stage = options.build_decode_stage(config.max_pixels)
    manifests = {shard.uri: shard.num_rows for shard in shards}
    decoded = data.read_and_decode_manifests(manifests, decode_stage, options.cpus.decode)
    classified = add_classifier(decoded, decode_stage, options, PASSTHROUGH_COLUMNS, config.save_embeddings, decisions)
    stalls = StallReporter(progress, options.describe_wait)
    with data.quiet_ray_loggers(), data.without_cluster_actors(), stalls:
        options.wait_for_device()
        for rows in stalls.watch(iter_predictions(classified, "score")):
            yield _divide_seconds(rows, options.parallelism)


def _divide_seconds(rows: pa.Table, parallelism: Mapping[str, int]) -> pa.Table:
    """Convert seconds per process to a share of the stage's wall time."""
    for stage, num_processes in parallelism.items():
        name = f"{stage}_s"
        seconds = pc.divide(rows[name], pa.scalar(num_processes, pa.float32()))
        rows = rows.set_column(rows.schema.get_field_index(name), name, seconds)
    return rows
