"""Training a head on a frozen backbone's features: every image goes through the backbone once.

The features are Parquet files under the run, a row an image, made by all workers together. Which they are is in the
name of their folder: a run that needs the same ones takes them from an earlier run beside it. A worker maps them from
its local disk, so they may be larger than memory.

Shapes: N rows, V views of an image, D features, K classes.
"""

import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from catsdogs import __version__, data, storage
from catsdogs.errors import InputError, RunError
from catsdogs.images import MAX_PIXELS
from catsdogs.model import HEAD, NUM_FEATURES
from catsdogs.predict import VALIDATION_BATCH_SIZE, Predictor, build_predictions, compute_probs
from catsdogs.progress import Message
from catsdogs.schema import RETRYABLE_STATUSES, parquet_bytes, read_table
from catsdogs.train.worker import Batch, TrainWorker, broadcast, decoded_ok

FEATURES, COMPLETE_MARKER = "features", "features.json"
TRAIN, VALIDATION = "train", "validation"
PART_ROWS = 256  # a multiple of every batch


@dataclass(frozen=True)
class FeatureTable:
    """Files with the features of their views, float32 (N, V, D); those of a file without an image are zeros."""

    rows: pa.Table
    features_NVD: np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class FeatureInputs:
    """A worker's features, computed where no run has them yet."""

    def __init__(self, worker: TrainWorker) -> None:
        self._worker = worker
        folder = _find_or_compute(worker)
        self._train = load_features(folder, TRAIN, worker.train_files.num_rows, worker.spec.config.num_views)
        self._validation = load_features(folder, VALIDATION, worker.validation_files.num_rows, 1)
        if worker.rank == 0:
            _finish(folder, self._train.rows, self._validation.rows)
        self._ok_N = decoded_ok(self._train.rows)
        self._targets_N = torch.tensor(self._train.rows["true_index"].to_numpy(), dtype=torch.int64)
        if worker.rank == 0:
            worker.leave_out(self._train.rows.filter(pa.array(~self._ok_N)))

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give features (N, D) and their classes for each step; the views of an image take turns by epoch."""
        view = (epoch - 1) % self._worker.spec.config.num_views
        for step in self._worker.plan.steps(epoch):
            rows_N = step[self._ok_N[step]]
            features_ND = torch.from_numpy(self._train.features_NVD[rows_N, view])
            yield features_ND.to(self._worker.device), self._targets_N[rows_N].to(self._worker.device)

    def predict_validation(self) -> Iterator[pa.Table]:
        """Label this worker's validation rows, in the batches in which their images would be labelled."""
        worker = self._worker
        for rows_N in worker.own_validation_batches():
            features_ND = torch.from_numpy(self._validation.features_NVD[rows_N, 0]).to(worker.device)
            with torch.inference_mode():
                probs_NK = compute_probs(worker.model.fc, features_ND)
            rows = self._validation.rows.take(pa.array(rows_N))
            yield build_predictions(rows, probs_NK, worker.spec.folder.class_names)


def _find_or_compute(worker: TrainWorker) -> str:
    """Find the features that this run needs, or make them."""
    name = broadcast(_fingerprint(worker) if worker.rank == 0 else "", worker.rank, worker.world_size)
    found = broadcast(_find(worker, name) if worker.rank == 0 else None, worker.rank, worker.world_size)
    if found is not None:
        worker.send_event(Message(f"features taken from {found}"))
        return found
    began = time.monotonic()
    predictor = Predictor(worker.model, worker.spec.folder.preprocessing, worker.precision, worker.device)
    folder = worker.spec.folder.path(FEATURES, name)
    views = worker.spec.config.num_views
    for split, files, num_views in ((TRAIN, worker.train_files, views), (VALIDATION, worker.validation_files, 1)):
        FeatureWriter(worker, predictor, folder, split, files, num_views).run()
    if worker.world_size > 1:
        dist.barrier()
    worker.send_event(Message(f"features computed in {time.monotonic() - began:.1f} s, kept in {folder}"))
    return folder


def _finish(folder: str, *splits: pa.Table) -> None:
    """Let other runs take the features, unless an image may do better another time."""
    uri = storage.join(folder, COMPLETE_MARKER)
    passing = any(status in RETRYABLE_STATUSES for rows in splits for status in rows["status"].to_pylist())
    if not passing and not storage.exists(uri):
        storage.write_bytes(uri, json.dumps({"rows": [rows.num_rows for rows in splits]}).encode())


def _fingerprint(worker: TrainWorker) -> str:
    """Name features by all that decides them: backbone, precision, preprocessing, files, views."""
    config, digest = worker.spec.config, hashlib.sha256()
    for name, tensor in worker.model.state_dict().items():
        if not name.startswith(f"{HEAD}."):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    views = [config.augment, config.num_views, None if config.augment == "none" else config.seed]
    settings = [__version__, worker.precision, asdict(worker.spec.folder.preprocessing), views]
    listed = [files.to_pydict() for files in (worker.train_files, worker.validation_files)]
    digest.update(json.dumps([settings, listed]).encode())
    return digest.hexdigest()[:16]


def _find(worker: TrainWorker, name: str) -> str | None:
    """Look for finished features in this run, then in those beside it."""
    config = worker.spec.config
    own = worker.spec.folder.path(FEATURES, name)
    beside = (storage.join(config.storage_path, run, FEATURES, name) for run in storage.list_names(config.storage_path))
    return next((uri for uri in [own, *beside] if storage.exists(storage.join(uri, COMPLETE_MARKER))), None)


def _part_uri(folder: str, split: str, part: int) -> str:
    return storage.join(folder, f"{split}-{part:05}.parquet")


class FeatureWriter:
    """Computes the features of one split: the parts that are missing, shared among the workers."""

    def __init__(
        self, worker: TrainWorker, predictor: Predictor, folder: str, split: str, files: pa.Table, num_views: int
    ) -> None:
        self._worker = worker
        self._predictor = predictor
        self._folder = folder
        self._split = split
        self._files = files
        self._num_views = num_views

    def run(self) -> None:
        """Write this worker's share."""
        worker = self._worker
        parts = range(-(-self._files.num_rows // PART_ROWS))
        there = set(storage.list_names(self._folder)) if worker.rank == 0 else set()
        missing = [part for part in parts if f"{self._split}-{part:05}.parquet" not in there]
        own = broadcast(missing, worker.rank, worker.world_size)[worker.rank :: worker.world_size]
        if not own:
            return
        rows = np.concatenate([np.arange(part * PART_ROWS, self._end(part)) for part in own])
        files = self._files.take(pa.array(rows)).append_column("row", pa.array(rows))
        batches = self._embedded(files)
        for part in own:
            num_batches = -(-(self._end(part) - part * PART_ROWS) // self._batch_size)
            table = pa.concat_tables(itertools.islice(batches, num_batches))
            storage.write_bytes(_part_uri(self._folder, self._split, part), parquet_bytes(table))

    def _end(self, part: int) -> int:
        return min((part + 1) * PART_ROWS, int(self._files.num_rows))

    @property
    def _batch_size(self) -> int:
        """Files whose views make a batch of images: a power of two, which cuts a part without a rest."""
        return 1 << int(math.log2(max(1, VALIDATION_BATCH_SIZE // self._num_views)))

    def _embedded(self, files: pa.Table) -> Iterator[pa.Table]:
        worker = self._worker
        size = worker.spec.folder.preprocessing.img_size
        done = 0
        for rows in data.iter_decoded_batches(files, self._stage(), worker.spec.decode_cpus):
            features_ND = self._predictor.embed(data.view_images(rows, size)).reshape(rows.num_rows, -1)
            features_ND[~decoded_ok(rows)] = 0
            kind = pa.list_(pa.float32(), self._num_views * NUM_FEATURES)
            values = pa.FixedSizeListArray.from_arrays(pa.array(features_ND.ravel()), type=kind)
            done += rows.num_rows
            worker.send_progress("embed", done, files.num_rows, self._split)  # the first worker's share speaks for all
            yield rows.drop_columns(["image"]).append_column("features", values)

    def _stage(self) -> data.DecodeForInference | data.DecodeForTraining:
        worker, config = self._worker, self._worker.spec.config
        preprocessing = worker.spec.folder.preprocessing
        if self._split == VALIDATION:
            return data.DecodeForInference(preprocessing, MAX_PIXELS, self._batch_size)
        epochs = tuple(range(1, self._num_views + 1))
        return data.DecodeForTraining(preprocessing, MAX_PIXELS, self._batch_size, config.augment, config.seed, epochs)


def load_features(folder: str, split: str, num_rows: int, num_views: int) -> FeatureTable:
    """Map the features of one split from a file on the local disk that nobody else sees.

    Raises:
        RunError: a part is damaged.
    """
    shape = (num_rows, num_views, NUM_FEATURES)
    with tempfile.TemporaryFile() as file:
        try:  # or a full disk would end the process when a page is written
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(np.float32).itemsize)
        except OSError as error:
            raise RunError(
                f"no room for {math.prod(shape) / 2**28:.1f} GiB in {tempfile.gettempdir()}: {error}"
            ) from error
        features_NVD = np.memmap(file, np.float32, "w+", shape=shape)
    tables = []
    for part, start in enumerate(range(0, num_rows, PART_ROWS)):
        uri = _part_uri(folder, split, part)
        try:
            table = read_table(storage.read_bytes(uri))
            end = start + table.num_rows
            features_NVD[start:end] = table["features"].combine_chunks().flatten().to_numpy().reshape(-1, *shape[1:])
        except (InputError, pa.ArrowException, KeyError, ValueError) as error:
            raise RunError(f"{uri}: expected features, but {error}; remove {folder}") from error
        tables.append(table.drop_columns(["features"]))
    rows = pa.concat_tables(tables)
    if rows.num_rows != num_rows:
        raise RunError(f"{folder}: expected {num_rows} rows of {split}, found {rows.num_rows}; remove it")
    return FeatureTable(rows, features_NVD)
