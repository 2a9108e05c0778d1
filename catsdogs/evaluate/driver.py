"""Classify a labelled folder with the stages of `score`, and compute metrics."""

import dataclasses
import json
from typing import Any

import pyarrow as pa

from catsdogs import metrics, storage
from catsdogs.calibration import fit_calibration
from catsdogs.checkpoint import CheckpointFiles, read_checkpoint
from catsdogs.config import EvaluateConfig
from catsdogs.decisions import Decisions, load_decisions, measure_decisions
from catsdogs.errors import InputError
from catsdogs.evaluate.writable_config import WritableConfig
from catsdogs.images import MAX_PIXELS
from catsdogs.labels import LabelSource, check_same_classes, list_evaluation, reindex_labels
from catsdogs.progress import Message, Progress, StageProgress, StallReporter, report_failed_rows
from catsdogs.ray_errors import to_run_error
from catsdogs.schema import build_schema, parquet_bytes
from catsdogs.start import import_while_ray_starts

METRICS, ROWS = "metrics.json", "predictions.parquet"


def evaluate(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Classify every file of a labelled folder or table; return the content of `metrics.json`."""
    config = dataclasses.replace(
        config,
        checkpoint=storage.absolute(config.checkpoint),
        output=storage.absolute(config.output),
    )
    storage.list_names(config.output)  # fails now, not after the work, if the path is a file
    checkpoint = read_checkpoint(config.checkpoint)
    decisions = load_decisions(config.min_precision, checkpoint, progress)
    source = LabelSource.from_config(config)
    labelled = list_evaluation(source, config.split, progress)
    check_same_classes(checkpoint.class_names, labelled.class_names, "the checkpoint", source.place)
    writable = WritableConfig.open(config.checkpoint, "--calibrate") if config.calibrate else None
    import_while_ray_starts("catsdogs.classify")
    files = reindex_labels(labelled, checkpoint.class_names).files
    rows = _predict(config, checkpoint, decisions, files, progress)
    predictions = rows.select(build_schema(False, decisions is not None).names)
    report_failed_rows(predictions, "images were not classified and count as incorrect", progress)
    result = metrics.compute_metrics(predictions, checkpoint.class_names) | {
        "device_precisions": sorted(rows["device_precision"].unique().to_pylist()),
        "model_sha256": checkpoint.sha256,
    }
    if labelled.groups is not None:
        result |= metrics.compute_group_metrics(predictions, labelled.groups)
    if decisions is not None:
        result["decisions"] = measure_decisions(predictions, decisions)
    if writable is not None:
        result["calibration"] = _calibrate(predictions, checkpoint, writable, progress)
    content = parquet_bytes(predictions.replace_schema_metadata(checkpoint.parquet_metadata()))
    storage.write_files(config.output, {ROWS: content, METRICS: json.dumps(result, indent=2).encode()})
    return result


def _calibrate(
    predictions: pa.Table, checkpoint: CheckpointFiles, config: WritableConfig, progress: Progress
) -> dict[str, Any]:
    """Write a calibration to the checkpoint; return the entry of `metrics.json`."""
    calibration = fit_calibration(predictions, checkpoint.class_names, checkpoint.sha256)
    if calibration is None:
        raise InputError(
            "--calibrate: expected labelled images that can be classified, found none; nothing was written"
        )
    config.write_calibration(calibration.to_json())
    progress(Message(f"{config.uri}: {calibration.describe()}"))
    return calibration.summarize()


def _predict(
    config: EvaluateConfig,
    checkpoint: CheckpointFiles,
    decisions: Decisions | None,
    files: pa.Table,
    progress: Progress,
) -> pa.Table:
    from catsdogs import data  # not at the top: import Ray Data, which the checks of the input do not need
    from catsdogs.classify import ClassifyOptions, add_classifier, iter_predictions

    options = ClassifyOptions.from_config(config, checkpoint, allow_gpu_jpegs=False)
    decode_stage = options.build_decode_stage(MAX_PIXELS)
    decoded = data.read_and_decode(files, decode_stage, options.cpus.decode)
    tables = []
    num_rows = 0
    try:
        classified = add_classifier(decoded, decode_stage, options, decisions=decisions)
        stalls = StallReporter(progress, options.describe_wait)
        with data.quiet_ray_loggers(), data.without_cluster_actors(), stalls:
            options.wait_for_device()
            table: pa.Table
            for table in stalls.watch(iter_predictions(classified, "evaluate")):
                tables.append(table)
                num_rows += table.num_rows
                progress(StageProgress("evaluate", num_rows, files.num_rows))
    except Exception as error:  # noqa: BLE001 - `cause` is raised
        cause = to_run_error(error, "evaluation", "nothing was written")
        raise cause from (error.__cause__ if cause is error else None)
    rows = pa.concat_tables(tables).sort_by("path")
    assert rows["path"].to_pylist() == sorted(files["path"].to_pylist()), "not one row for each listed file"
    return rows
