"""Training on images."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from catsdogs import data, images
from catsdogs.images import MAX_PIXELS
from catsdogs.images.tensors import to_device
from catsdogs.predict import VALIDATION_BATCH_SIZE, Predictor, build_predictions
from catsdogs.schema import RETRYABLE_STATUSES
from catsdogs.train.worker import Batch, TrainWorker, decoded_ok

DecodedRows = tuple[pa.Table, images.ImageArray]  # rows and their pixels
MAX_CACHED_BYTES = 1 << 30  # bytes of a worker's validation images, which are the same in every epoch


class ImageInputs:
    """A worker's images."""

    def __init__(self, worker: TrainWorker) -> None:
        self._worker = worker
        self._cached: list[DecodedRows] | None = None

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give uint8 images (N, H, W, C) and their classes for each step; rows without an image are left out."""
        worker, spec = self._worker, self._worker.spec
        batches = data.iter_epoch_batches(
            worker.train_files,
            worker.plan,
            epoch,
            spec.folder.preprocessing,
            spec.config.augment,
            spec.decode_cpus,
            spec.decoded_cache,
        )
        for _ in range(worker.plan.num_steps):
            yield self._tensors(next(batches, None))

    def _tensors(self, rows: pa.Table | None) -> Batch:
        if rows is None:
            return torch.zeros((0, 1, 1, 3), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        worker = self._worker
        images_NHWC = data.view_images(rows, worker.spec.folder.preprocessing.img_size)
        ok_N = decoded_ok(rows)
        if not ok_N.all():
            worker.leave_out(rows.filter(pa.array(~ok_N)))
            images_NHWC = images_NHWC[ok_N]
        targets_N = torch.tensor(rows["true_index"].to_numpy()[ok_N], dtype=torch.int64, device=worker.device)
        return to_device(images_NHWC, worker.device), targets_N

    def predict_validation(self) -> Iterator[pa.Table]:
        """Label this worker's validation rows."""
        worker, folder = self._worker, self._worker.spec.folder
        predictor = Predictor(worker.model, folder.preprocessing, worker.precision, worker.device)
        for rows, images_NHWC in self._cached or self._decoded():
            yield build_predictions(rows, predictor(images_NHWC), folder.class_names)

    def _decoded(self) -> Iterator[DecodedRows]:
        """Decode this worker's validation images; those of few are kept, unless some may do better another time."""
        worker, preprocessing = self._worker, self._worker.spec.folder.preprocessing
        stage = data.DecodeForInference(preprocessing, MAX_PIXELS, VALIDATION_BATCH_SIZE)
        own = worker.own_validation_batches()
        files = worker.validation_files.take(pa.array(np.concatenate(own) if own else [], pa.int64()))
        cached: list[DecodedRows] | None = (
            [] if files.num_rows / VALIDATION_BATCH_SIZE * stage.batch_bytes <= MAX_CACHED_BYTES else None
        )
        for rows in data.iter_decoded_batches(files, stage, worker.spec.decode_cpus):
            images_NHWC, rows = data.view_images(rows, preprocessing.img_size), rows.drop_columns(["image"])
            if cached is not None:
                own_rows = rows.take(pa.array(range(rows.num_rows)))  # or Ray's memory would hold both
                cached.append((own_rows, images_NHWC.copy()))
            if not set(RETRYABLE_STATUSES).isdisjoint(rows["status"].to_pylist()):
                cached = None
            yield rows, images_NHWC
        self._cached = cached
