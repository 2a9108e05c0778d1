"""score(): list -> decode -> classify -> write.

plan.py       input -> the files to score, cut into shards, as Parquet
classify.py   the stage that holds the model
write.py      rows -> parts, their check, `_SUCCESS`
show.py       the summary and the report
"""

import dataclasses
import json
import time
from typing import Any

from catsdogs import checkpoint, data, storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError
from catsdogs.progress import Message, Progress, Step, silent
from catsdogs.score.classify import ClassifyOptions, classified
from catsdogs.score.plan import Plan, make_plan
from catsdogs.score.show import summarize, write_report
from catsdogs.score.write import RUN, SUCCESS, SUMMARY, PartWriter, check_parts


def score(config: ScoreConfig, progress: Progress = silent) -> dict[str, Any]:
    """Label every listed file; the content of `_summary.json`.

    Raises:
        InputError: the input, the checkpoint or the output cannot be used.
        RunError: the run failed; finished parts are kept.
    """
    config = _resolve(config)
    if storage.list_names(config.output):
        raise InputError(f"--output {config.output}: expected an empty or new folder, found files; choose another")
    model = checkpoint.load(config.checkpoint)
    data.start_ray()
    started = time.monotonic()
    plan = make_plan(config, progress)
    storage.write_bytes(storage.join(config.output, RUN), _json(_run_record(config, model)))
    writer = PartWriter(config.output, plan, model)
    options = ClassifyOptions.of(config, model)
    progress(Message(f"{plan.num_files:,} files to score, {options.num_actors} x {options.device_name}"))
    _run(config, plan, options, writer, progress)
    summary = summarize(plan, writer, model, seconds=time.monotonic() - started)
    storage.write_bytes(storage.join(config.output, SUMMARY), _json(summary))
    write_report(config, summary, writer)
    check_parts(config.output, plan)
    storage.write_bytes(storage.join(config.output, SUCCESS), b"")
    return summary


def _resolve(config: ScoreConfig) -> ScoreConfig:
    return dataclasses.replace(
        config,
        input=storage.absolute(config.input),
        checkpoint=storage.absolute(config.checkpoint),
        output=storage.absolute(config.output),
    )


def _run_record(config: ScoreConfig, model: checkpoint.Checkpoint) -> dict[str, Any]:
    return {
        "input": config.input,
        "limit": config.limit,
        "shard_size": config.shard_size,
        "max_pixels": config.max_pixels,
        "checkpoint": config.checkpoint,
        "model_sha256": model.sha256,
        "class_names": list(model.class_names),
        "preprocessing": dataclasses.asdict(model.preprocessing),
    }


def _run(config: ScoreConfig, plan: Plan, options: ClassifyOptions, writer: PartWriter, progress: Progress) -> None:
    stage = data.DecodeForInference(options.checkpoint.preprocessing, config.max_pixels)
    files = data.manifest_dataset(plan.manifest, config.batch_size)
    decoded = data.decode_blocks(files, stage, options.share.decode)
    started = time.monotonic()
    try:
        for rows in classified(decoded, options).iter_batches(batch_size=None, batch_format="pyarrow"):
            writer.add(rows)
            rate = writer.num_rows / (time.monotonic() - started)
            left_s = (plan.num_files - writer.num_rows) / rate
            progress(
                Step(
                    "score",
                    writer.num_rows,
                    plan.num_files,
                    f"{rate:.1f} img/s  {writer.failures()}  ETA {left_s:,.0f} s",
                )
            )
    except Exception as error:
        raise data.explain(
            error, "scoring", f"{writer.num_parts} finished parts are kept in {config.output}"
        ) from error


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


__all__ = ["score"]
