"""Features of images: those that a run with a frozen backbone has saved, else computed with a checkpoint.

The saved features of a training image are of augmented views. Their mean is used: on 2,000 photographs, it finds more
incorrect labels than the features of one view (docs/audit.md).

Shapes: N images, V views, D features.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catsdogs import data
from catsdogs.auditing.folds import IndexArray
from catsdogs.auditing.heads import FloatArray, iter_chunks
from catsdogs.checkpoint import NUM_FEATURES, CheckpointFiles
from catsdogs.classify import ClassifyOptions, add_classifier, iter_predictions
from catsdogs.config import ScoreConfig
from catsdogs.images import MAX_PIXELS
from catsdogs.progress import Message, Progress, StageProgress, StallReporter
from catsdogs.ray_errors import to_run_error
from catsdogs.schema import OK
from catsdogs.train.feature_files import allocate_on_disk, find_location, iter_parts


class Features(NamedTuple):
    """Features of those files that have an image.

    Attributes:
        rows_N: of the files, ascending.
        features_ND: a memory-mapped file.
        source: where they are from, for messages.
    """

    rows_N: IndexArray
    features_ND: FloatArray
    source: str


def load_or_compute_features(run: str, checkpoint: CheckpointFiles, files: pa.Table, progress: Progress) -> Features:
    """Load the features of a run if it has those of all files in their present version; else compute them.

    Args:
        files: of images: `path`, `size_bytes`, `version`.

    Raises:
        RunError: saved features are damaged, the disk is full, or Ray failed.
    """
    features_ND = allocate_on_disk((files.num_rows, NUM_FEATURES))
    uri = find_location(run)
    if uri is not None and _load(uri, files, features_ND):
        progress(Message(f"using the features in {uri}"))
        return Features(np.arange(files.num_rows), features_ND, uri)
    if uri is not None:
        progress(Message(f"{uri} does not have the features of all images in their present version"))
    progress(Message(f"computing the features of {files.num_rows:,} images with {checkpoint.uri}"))
    is_ok_N = _compute(checkpoint, files, features_ND, progress)
    rows_N = np.flatnonzero(is_ok_N)
    if len(rows_N) < files.num_rows:
        for rows in iter_chunks(len(rows_N)):  # in place: a row only moves up
            features_ND[rows] = features_ND[rows_N[rows]]
    return Features(rows_N, features_ND[: len(rows_N)], checkpoint.uri)


def _load(uri: str, files: pa.Table, features_ND: FloatArray) -> bool:
    """Fill in the mean features of all views; return whether all files were found."""
    keys = zip(files["path"].to_pylist(), files["version"].to_pylist(), strict=True)
    row_by_key = {key: row for row, key in enumerate(keys) if key[1] is not None}
    if len(row_by_key) < files.num_rows:  # a file without a version may have changed
        return False
    for part in iter_parts(uri):
        columns = (part.rows[name].to_pylist() for name in ("path", "version", "status"))
        for i, (path, version, status) in enumerate(zip(*columns, strict=True)):
            row = row_by_key.pop((path, version), None) if status == OK else None
            if row is not None:
                features_ND[row] = part.features_NVD[i].mean(axis=0)
    return not row_by_key


def _compute(
    checkpoint: CheckpointFiles, files: pa.Table, features_ND: FloatArray, progress: Progress
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Fill in the features, by the stages of `score`; return which files have an image."""
    settings = ScoreConfig(input="", checkpoint=checkpoint.uri, output="")  # for its defaults
    options = ClassifyOptions.from_config(settings, checkpoint, allow_gpu_jpegs=True)
    stage = options.build_decode_stage(MAX_PIXELS)
    numbered = files.append_column("row", pa.array(np.arange(files.num_rows)))
    decoded = data.read_and_decode(numbered, stage, options.cpus.decode)
    is_ok_N = np.zeros(files.num_rows, dtype=np.bool_)
    num_rows = 0
    try:
        classified = add_classifier(decoded, stage, options, passthrough=("row",), save_embeddings=True)
        stalls = StallReporter(progress, options.describe_wait)
        with data.quiet_ray_loggers(), data.without_cluster_actors(), stalls:
            options.wait_for_device()
            table: pa.Table
            for table in stalls.watch(iter_predictions(classified, "embed")):
                found = table.filter(table["embedding"].is_valid())
                is_ok_N[found["row"].to_numpy()] = True
                features_ND[found["row"].to_numpy()] = _to_array(found["embedding"])
                num_rows += table.num_rows
                progress(StageProgress("embed", num_rows, files.num_rows))
    except Exception as error:  # noqa: BLE001 - `cause` is raised
        cause = to_run_error(error, "the audit", "nothing was written")
        raise cause from (error.__cause__ if cause is error else None)
    return is_ok_N


def _to_array(embeddings: pa.ChunkedArray) -> FloatArray:
    return np.asarray(embeddings.combine_chunks().flatten().to_numpy().reshape(-1, NUM_FEATURES))
