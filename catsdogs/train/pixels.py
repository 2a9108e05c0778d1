"""Training on images."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from catsdogs import data, images
from catsdogs.images import MAX_PIXELS
from catsdogs.images.tensors import to_device
from catsdogs.predict import BATCH_SIZE, Predictor, predictions
from catsdogs.schema import RETRIED
from catsdogs.train.worker import Batch, Worker, have_image

Decoded = tuple[pa.Table, images.Pixels]  # rows and their pixels
MOST_KEPT = 1 << 30  # bytes of a worker's validation images, which are the same in every epoch


class Pixels:
    """A worker's images."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._kept: list[Decoded] | None = None

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give uint8 images (N, H, W, C) and their classes for each step; rows without an image are left out."""
        worker, spec = self._worker, self._worker.spec
        batches = data.epoch_batches(
            worker.train_files,
            worker.plan,
            epoch,
            spec.folder.preprocessing,
            spec.config.augment,
            spec.decode_cpus,
            spec.held,
        )
        for _ in range(worker.plan.num_steps):
            yield self._tensors(next(batches, None))

    def _tensors(self, rows: pa.Table | None) -> Batch:
        if rows is None:
            return torch.zeros((0, 1, 1, 3), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        worker = self._worker
        images_NHWC = data.images_of(rows, worker.spec.folder.preprocessing.img_size)
        ok_N = have_image(rows)
        if not ok_N.all():
            worker.leave_out(rows.filter(pa.array(~ok_N)))
            images_NHWC = images_NHWC[ok_N]
        targets_N = torch.tensor(rows["true_index"].to_numpy()[ok_N], dtype=torch.int64, device=worker.device)
        return to_device(images_NHWC, worker.device), targets_N

    def predicted(self) -> Iterator[pa.Table]:
        """Label this worker's validation rows."""
        worker, folder = self._worker, self._worker.spec.folder
        predictor = Predictor(worker.model, folder.preprocessing, worker.precision, worker.device)
        for rows, images_NHWC in self._kept or self._decoded():
            yield predictions(rows, predictor(images_NHWC), folder.class_names)

    def _decoded(self) -> Iterator[Decoded]:
        """Decode this worker's validation images; those of few are kept, unless some may do better another time."""
        worker, preprocessing = self._worker, self._worker.spec.folder.preprocessing
        stage = data.DecodeForInference(preprocessing, MAX_PIXELS, BATCH_SIZE)
        own = worker.own_validation_batches()
        files = worker.validation_files.take(pa.array(np.concatenate(own) if own else [], pa.int64()))
        kept: list[Decoded] | None = [] if files.num_rows / BATCH_SIZE * stage.batch_bytes <= MOST_KEPT else None
        for rows in data.decoded_batches(files, stage, worker.spec.decode_cpus):
            images_NHWC, rows = data.images_of(rows, preprocessing.img_size), rows.drop_columns(["image"])
            if kept is not None:
                own_rows = rows.take(pa.array(range(rows.num_rows)))  # or Ray's memory would hold both
                kept.append((own_rows, images_NHWC.copy()))
            if not set(RETRIED).isdisjoint(rows["status"].to_pylist()):
                kept = None
            yield rows, images_NHWC
        self._kept = kept
