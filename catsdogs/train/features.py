"""Features of a frozen backbone, computed once per view of an image, as the inputs of its head.

All workers compute features and write them to a folder of the run (`train/feature_files.py`). The folder's name is a
hash of everything that the features depend on, so that later runs beside this one find them, and that a worker that
writes there too late writes the same. They do not depend on labels: a run on corrected labels finds them, too.

Shapes: N rows, V views of an image, D features, K classes.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch

from catsdogs import __version__, data, storage
from catsdogs.checkpoint import HEAD, NUM_FEATURES
from catsdogs.data.datasets import RowIndices
from catsdogs.images import MAX_PIXELS
from catsdogs.labels import TRAIN, VALIDATION
from catsdogs.predict import VALIDATION_BATCH_SIZE, Predictor, compute_probs
from catsdogs.predictions import build_predictions
from catsdogs.progress import Message
from catsdogs.resnet import ResNet50
from catsdogs.schema import LABELLED_FILES, RETRYABLE_STATUSES, parquet_bytes
from catsdogs.train.feature_files import (
    COMPLETE_MARKER,
    PART_ROWS,
    FeatureTable,
    format_part,
    load_features,
    write_location,
)
from catsdogs.train.graph import Batch
from catsdogs.train.inputs import LeftOutImages, is_decoded, list_validation_batches
from catsdogs.train.run_folder import FEATURES
from catsdogs.train.worker import TrainWorker

LABEL = LABELLED_FILES.field("true_index")


class FeatureInputs:
    """Features in the folder `uri` as the inputs of a run that trains the head."""

    def __init__(self, worker: TrainWorker, uri: str) -> None:
        spec = worker.spec
        self._worker = worker
        self._num_views = spec.config.num_views
        self._train = load_features(uri, TRAIN, spec.train_files.num_rows, self._num_views)
        self._validation = load_features(uri, VALIDATION, spec.validation_files.num_rows, 1)
        self._decoded_N = is_decoded(self._train.rows)
        self._targets_N = torch.tensor(spec.train_files[LABEL.name].to_numpy(), dtype=torch.int64)
        self.left_out = LeftOutImages(worker.progress.left_out)
        if worker.ranks.is_first:
            _mark_complete(uri, [self._train, self._validation])
            write_location(spec.folder.uri, uri)
            self.left_out.add(self._train.rows.filter(pa.array(~self._decoded_N)))

    def iter_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield one batch per step: features, float32 (N, D), of one view per image, and their classes."""
        view = (epoch - 1) % self._num_views
        for step_rows_N in self._worker.plan.steps(epoch)[first_step:]:
            rows_N = step_rows_N[self._decoded_N[step_rows_N]]
            features_ND = torch.from_numpy(self._train.features_NVD[rows_N, view])
            yield features_ND.to(self._worker.device), self._targets_N[rows_N].to(self._worker.device)

    def predict_validation(self, model: ResNet50) -> Iterator[pa.Table]:
        """Predict the worker's validation rows, one table of `PREDICTIONS` per batch."""
        labelled = self._validation.rows.append_column(LABEL, self._worker.spec.validation_files[LABEL.name])
        for rows_N in list_validation_batches(labelled.num_rows, self._worker.ranks):
            features_ND = torch.from_numpy(self._validation.features_NVD[rows_N, 0]).to(self._worker.device)
            with torch.inference_mode():
                probs_NK = compute_probs(model.fc, features_ND)
            yield build_predictions(labelled.take(pa.array(rows_N)), probs_NK, self._worker.spec.folder.class_names)


def find_or_compute_features(worker: TrainWorker) -> str:
    """Return the URI of a folder with the features of all images."""
    name, found = worker.ranks.broadcast(lambda: _find(worker))
    if found is not None:
        worker.events.send(Message(f"using the features in {found}"))
        return found
    started, spec = time.monotonic(), worker.spec
    predictor = Predictor(worker.model.state_dict(), spec.folder.preprocessing, worker.precision, worker.device)
    uri = spec.folder.path(FEATURES, name)
    FeatureWriter(worker, predictor, uri, TRAIN, spec.train_files, spec.config.num_views).write()
    FeatureWriter(worker, predictor, uri, VALIDATION, spec.validation_files, num_views=1).write()
    worker.ranks.barrier()
    worker.events.send(Message(f"features computed in {time.monotonic() - started:.1f} s and saved in {uri}"))
    return uri


def _find(worker: TrainWorker) -> tuple[str, str | None]:
    """Return the name of the features' folder, and the URI of a complete one in this run or beside it, or None."""
    name, spec = _compute_fingerprint(worker), worker.spec
    storage_path = spec.config.storage_path
    # Files without a version may have changed since another run.
    has_versions = not any(files["version"].null_count for files in (spec.train_files, spec.validation_files))
    runs = storage.list_names(storage_path) if has_versions else []
    other_runs = (storage.join(storage_path, run, FEATURES, name) for run in runs)
    uris = itertools.chain([worker.spec.folder.path(FEATURES, name)], other_runs)
    return name, next((uri for uri in uris if storage.exists(storage.join(uri, COMPLETE_MARKER))), None)


def _compute_fingerprint(worker: TrainWorker) -> str:
    """Hash what the features depend on: backbone, precision, preprocessing, views, files."""
    spec, config, digest = worker.spec, worker.spec.config, hashlib.sha256()
    for name, tensor in worker.model.state_dict().items():
        if not name.startswith(f"{HEAD}."):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    views = [config.augment, config.num_views, None if config.augment == "none" else config.seed]
    settings = [__version__, worker.precision, asdict(spec.folder.preprocessing), views]
    listed = [files.drop_columns([LABEL.name]).to_pydict() for files in (spec.train_files, spec.validation_files)]
    digest.update(json.dumps([settings, listed]).encode())
    return digest.hexdigest()[:16]


def _mark_complete(uri: str, tables: list[FeatureTable]) -> None:
    """Mark the features as usable by later runs, unless an image had a transient error."""
    marker = storage.join(uri, COMPLETE_MARKER)
    statuses = {status for table in tables for status in table.rows["status"].to_pylist()}
    if statuses.isdisjoint(RETRYABLE_STATUSES) and not storage.exists(marker):
        storage.write_bytes(marker, json.dumps({"rows": [table.rows.num_rows for table in tables]}).encode())


@dataclass(frozen=True)
class FeatureWriter:
    """Computes the features of one split; the workers share the missing parts."""

    worker: TrainWorker
    predictor: Predictor
    uri: str
    split: str
    files: pa.Table
    num_views: int

    def write(self) -> None:
        ranks = self.worker.ranks
        missing = ranks.broadcast(self._list_missing_parts)
        own = missing[ranks.rank :: ranks.world_size]
        if not own:
            return
        batches = self._iter_features(np.concatenate([self._part_rows(part) for part in own]))
        for part in own:
            num_batches = math.ceil(len(self._part_rows(part)) / self._batch_size)
            table = pa.concat_tables(itertools.islice(batches, num_batches))
            storage.write_bytes(storage.join(self.uri, format_part(self.split, part)), parquet_bytes(table))

    def _list_missing_parts(self) -> list[int]:
        existing = set(storage.list_names(self.uri))
        parts = range(math.ceil(self.files.num_rows / PART_ROWS))
        return [part for part in parts if format_part(self.split, part) not in existing]

    @property
    def _batch_size(self) -> int:
        """Files per batch of views: a power of two, which divides PART_ROWS."""
        return 1 << int(math.log2(max(1, VALIDATION_BATCH_SIZE // self.num_views)))

    def _part_rows(self, part: int) -> RowIndices:
        return np.arange(part * PART_ROWS, min((part + 1) * PART_ROWS, self.files.num_rows))

    def _iter_features(self, rows_N: RowIndices) -> Iterator[pa.Table]:
        """Yield the files of these rows with their features, one table per batch."""
        size = self.worker.spec.folder.preprocessing.img_size
        column_type = pa.list_(pa.float32(), self.num_views * NUM_FEATURES)
        files = self.files.drop_columns([LABEL.name]).take(pa.array(rows_N)).append_column("row", pa.array(rows_N))
        num_done = 0
        for rows in data.iter_decoded_batches(files, self._build_stage(), self.worker.spec.decode_cpus):
            features = self.predictor.embed(data.view_images(rows, size)).reshape(rows.num_rows, -1)
            features[~is_decoded(rows)] = 0
            column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), type=column_type)
            num_done += rows.num_rows
            self.worker.events.send_progress("embed", num_done, files.num_rows, self.split)  # of the first worker
            yield rows.drop_columns(["image"]).append_column("features", column)

    def _build_stage(self) -> data.DecodeForInference | data.DecodeForTraining:
        config, preprocessing = self.worker.spec.config, self.worker.spec.folder.preprocessing
        if self.split == VALIDATION:
            return data.DecodeForInference(preprocessing, MAX_PIXELS, self._batch_size)
        epochs = tuple(range(1, self.num_views + 1))  # view i is augmented as in epoch i
        return data.DecodeForTraining(preprocessing, MAX_PIXELS, self._batch_size, config.augment, config.seed, epochs)
