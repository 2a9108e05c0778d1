"""review(): pick rows of a result, decode their images, and write a page to label them on."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from catsdogs import storage
from catsdogs.config import ReviewConfig
from catsdogs.errors import InputError
from catsdogs.images import ImageArray, Preprocessing
from catsdogs.labels import normalize_name
from catsdogs.progress import Message, Progress, StageProgress
from catsdogs.results import Result
from catsdogs.reviewing.picks import COLUMNS, Picker
from catsdogs.start import import_while_ray_starts
from catsdogs.table_files import format_csv
from catsdogs.text import format_names

PAGE, TABLE, LABEL_STUDIO = "review.html", "review.csv", "labelstudio.json"
THUMBNAIL = Preprocessing(img_size=256, crop_pct=1.0)


def review(config: ReviewConfig, progress: Progress) -> dict[str, Any]:
    """Pick images and write the page; return the number of `picked` images and of `candidates`."""
    config = dataclasses.replace(config, scores=storage.absolute(config.scores), output=storage.absolute(config.output))
    if config.output == config.scores:
        raise InputError(f"--output {config.output}: expected another folder than --scores")
    storage.list_names(config.output)  # fails now, not after the work, if the path is a file
    result = Result.open(config.scores)
    class_names = [normalize_name(name) for name in result.class_names]
    picker = _pick(config, result, class_names, progress)
    picks = picker.pick()
    if not picks.num_rows:
        raise InputError(f"{config.scores}: expected images to review, found none: {_describe_candidates(config)}")
    if picks.num_rows < config.n:
        reason = "there are no others"
        if picks.num_rows < picker.num_candidates:
            reason += " that look different"
        found = f"{picks.num_rows:,} of {picker.num_candidates:,} candidates"
        progress(Message(f"{found} are picked, fewer than --n {config.n:,}: {reason}"))
    data = import_while_ray_starts("catsdogs.data")
    images = data.decode_images(picks["path"].to_pylist(), THUMBNAIL)
    _write(config.output, picks, class_names, result.model_sha256, images)
    return {"picked": picks.num_rows, "candidates": picker.num_candidates}


def _describe_candidates(config: ReviewConfig) -> str:
    of_class = f" and the label {config.class_name}" if config.class_name is not None else ""
    differs = ", a true_label and another label" if config.strategy == "suspect" else ""
    return f"no row has the status ok{of_class}{differs}"


def _pick(config: ReviewConfig, result: Result, class_names: list[str], progress: Progress) -> Picker:
    """Read all rows, more than once if most of them look alike."""
    if config.class_name is not None:
        config = dataclasses.replace(config, class_name=normalize_name(config.class_name))
        if config.class_name not in class_names:
            raise InputError(f"--class: expected one of {format_names(class_names)}, got {config.class_name!r}")
    # A random sample stays random.
    drops_alike = result.has_embeddings and config.strategy != "random"
    picker = Picker(config, class_names, drops_alike)
    classes = {name: i for i, name in enumerate(class_names)}
    may_find_more = True
    while may_find_more:
        num_rows = 0
        for batch in result.iter_batches(classes, drops_alike):
            picker.add(batch)
            num_rows += len(batch.rows)
            progress(StageProgress("read", num_rows, result.num_rows))
        may_find_more = picker.finish_pass()
    return picker


def _write(
    output: str, picks: pa.Table, class_names: list[str], model_sha256: str | None, images: dict[str, ImageArray]
) -> None:
    """Write the files; the page is the last."""
    from catsdogs import report  # not at the top: matplotlib would add a second to every start

    rows = picks.to_pylist()
    table = _format_csv(rows)
    digest = hashlib.sha256(json.dumps([class_names, table]).encode()).hexdigest()
    pictures = [
        report.ReviewPicture(path=row["path"], label=row["label"], prob=row["prob"], image=images.get(row["path"]))
        for row in rows
    ]
    page = report.review_page(class_names, pictures, digest)
    tasks = [_build_task(row, model_sha256) for row in rows]
    contents = {TABLE: table, LABEL_STUDIO: json.dumps(tasks, indent=1), PAGE: page}
    storage.write_files(output, {name: content.encode() for name, content in contents.items()})


def _format_csv(rows: Iterable[dict[str, Any]]) -> str:
    header = ["predicted" if name == "label" else name for name in COLUMNS]
    return format_csv([header, *([row[name] for name in COLUMNS] for row in rows)])


def _build_task(row: dict[str, Any], model_sha256: str | None) -> dict[str, Any]:
    """Build a task of Label Studio with the prediction as pre-annotation (labelstud.io/guide/predictions)."""
    choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [row["label"]]}}
    prediction = {"model_version": model_sha256 or "unknown", "score": row["prob"], "result": [choice]}
    return {"data": {"image": row["path"]}, "predictions": [prediction]}
