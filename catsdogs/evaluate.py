"""Score a labelled folder, then metrics."""

import dataclasses
import json
from typing import Any

import pyarrow as pa

from catsdogs import data, metrics, saved, storage
from catsdogs.classify import ClassifyOptions, add_classifier
from catsdogs.config import EvaluateConfig
from catsdogs.images import MAX_PIXELS
from catsdogs.labels import check_same_classes, list_evaluation, reindex_labels
from catsdogs.progress import Message, Progress, StageProgress, silent
from catsdogs.schema import OK, PREDICTIONS, parquet_bytes
from catsdogs.score.parts import build_file_metadata
from catsdogs.start import start_ray

METRICS, ROWS = "metrics.json", "predictions.parquet"


def evaluate(config: EvaluateConfig, progress: Progress = silent) -> dict[str, Any]:
    """Label every file of a labelled folder and compare; the content of `metrics.json`.

    Raises:
        InputError: the folder or the checkpoint cannot be used, or their classes differ.
        RunError: the run failed.
    """
    config = dataclasses.replace(
        config,
        data_dir=storage.absolute(config.data_dir),
        checkpoint=storage.absolute(config.checkpoint),
        output=storage.absolute(config.output),
    )
    storage.list_names(config.output)  # a file in its place is an error now, not after the work
    model = saved.read(config.checkpoint)
    labelled = list_evaluation(config.data_dir, config.split, progress)
    check_same_classes(model.class_names, labelled.class_names, "the checkpoint", config.data_dir)
    start_ray()
    options = ClassifyOptions.from_config(config, model, allow_gpu_jpegs=False)
    predicted = _predict(reindex_labels(labelled, model.class_names), options, progress)
    predictions = predicted.select(PREDICTIONS.names)
    _report_failed(predictions, progress)
    device_precisions = sorted(predicted["device_precision"].unique().to_pylist())
    result = metrics.compute_metrics(predictions, model.class_names) | {
        "device_precisions": device_precisions,
        "model_sha256": model.sha256,
    }
    _write(config, predictions, result, model)
    return result


def _predict(files: pa.Table, options: ClassifyOptions, progress: Progress) -> pa.Table:
    stage = options.stage(MAX_PIXELS)
    decoded = data.read_and_decode(files, stage, options.cpus.decode)
    tables: list[pa.Table] = []
    done = 0
    try:
        with data.without_cluster_actors():
            rows: pa.Table
            for rows in add_classifier(decoded, stage, options).iter_batches(batch_size=None, batch_format="pyarrow"):
                tables.append(rows)
                done += rows.num_rows
                progress(StageProgress("evaluate", done, files.num_rows))
    except Exception as error:
        raise data.to_run_error(error, "evaluation", "nothing was written") from error
    return pa.concat_tables(tables).sort_by("path")


def _report_failed(predictions: pa.Table, progress: Progress) -> None:
    failed = [row for row in predictions.select(["path", "status", "error"]).to_pylist() if row["status"] != OK]
    if failed:
        progress(Message(f"{len(failed)} images have no label and count as wrong"))
    for row in failed[:10]:
        progress(Message(f"  {row['path']}: {row['status']}, {row['error']}"))


def _write(config: EvaluateConfig, predictions: pa.Table, result: dict[str, Any], model: saved.CheckpointFiles) -> None:
    content = parquet_bytes(predictions.replace_schema_metadata(build_file_metadata(model)))
    storage.write_bytes(storage.join(config.output, ROWS), content)
    storage.write_bytes(storage.join(config.output, METRICS), json.dumps(result, indent=2).encode())
