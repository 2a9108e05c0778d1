"""Images as the inputs of training and validation.

Shapes: N batch, H, W, C channels.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import torch

from catsdogs import data
from catsdogs.data.datasets import RowIndices
from catsdogs.images import MAX_PIXELS, ImageArray
from catsdogs.images.tensors import to_device
from catsdogs.predict import VALIDATION_BATCH_SIZE, Predictor
from catsdogs.predictions import build_predictions
from catsdogs.progress import report_failed_rows
from catsdogs.resnet import ResNet50
from catsdogs.schema import OK, RETRYABLE_STATUSES, parquet_bytes
from catsdogs.train.graph import Batch
from catsdogs.train.resident import Room, load_resident_images, measure_room
from catsdogs.train.run_folder import LEFT_OUT
from catsdogs.train.step_state import LeftOutRow
from catsdogs.train.worker import Ranks, TrainWorker

DecodedBatch = tuple[pa.Table, ImageArray]  # rows without `image`, and images_NHWC
MAX_CACHED_BYTES = 1 << 30  # of a worker's validation images


class ImageInputs:
    """Images as the inputs of a run that trains all layers; on a GPU those that fit are resident there."""

    def __init__(self, worker: TrainWorker, room: Room | None = None) -> None:
        self._worker = worker
        self._spec = worker.spec
        self._size = worker.spec.folder.preprocessing.img_size
        self._validation_cache: list[DecodedBatch] | None = None
        self._resident = load_resident_images(worker, room or measure_room(worker))
        self._targets_N = worker.spec.train_files["true_index"].to_numpy().astype(np.int64)
        self.left_out = LeftOutImages(worker.progress.left_out)
        for rows in self._resident.failed:
            self.left_out.add(rows)

    def iter_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield one batch per step: images, uint8 (N, H, W, C), and their classes; resident ones come first."""
        spec, config, plan = self._spec, self._spec.config, self._worker.plan
        stage = data.DecodeForTraining(
            spec.folder.preprocessing, MAX_PIXELS, plan.batch_size, config.augment, config.seed, (epoch,)
        )
        steps = [self._resident.split(rows_N) for rows_N in plan.steps(epoch)[first_step:]]
        to_read = [rows_N for _, rows_N in steps if len(rows_N)]
        tables = data.iter_epoch_batches(spec.train_files, to_read, stage, spec.decode_cpus)
        for resident_N, read_N in steps:  # this worker may have no rows in the last step
            parts = [self._empty_batch()] if not len(resident_N) + len(read_N) else []
            if len(resident_N):
                targets_N = to_device(self._targets_N[resident_N], self._worker.device)
                parts.append((self._resident.augment(resident_N, stage), targets_N))
            if len(read_N):
                parts.append(self._to_batch(next(tables)))
            yield _join(parts)

    def _empty_batch(self) -> Batch:
        images_NHWC = torch.zeros((0, self._size, self._size, 3), dtype=torch.uint8, device=self._worker.device)
        return images_NHWC, torch.zeros(0, dtype=torch.int64, device=self._worker.device)

    def _to_batch(self, rows: pa.Table) -> Batch:
        images_NHWC = data.view_images(rows, self._size)
        decoded_N = is_decoded(rows)
        if not decoded_N.all():
            self.left_out.add(rows.filter(pa.array(~decoded_N)))
            images_NHWC = images_NHWC[decoded_N]
        targets_N = rows["true_index"].to_numpy()[decoded_N].astype(np.int64)
        return to_device(images_NHWC, self._worker.device), to_device(targets_N, self._worker.device)

    def predict_validation(self, model: ResNet50) -> Iterator[pa.Table]:
        """Predict the worker's validation rows, one table of `PREDICTIONS` per batch."""
        folder = self._spec.folder
        predictor = Predictor(model.state_dict(), folder.preprocessing, self._worker.precision, self._worker.device)
        for rows, images_NHWC in self._validation_cache or self._decode_validation():
            yield build_predictions(rows, predictor(images_NHWC), folder.class_names)

    def _decode_validation(self) -> Iterator[DecodedBatch]:
        """Decode the worker's validation images; cache them if they are few and without transient errors."""
        all_files = self._spec.validation_files
        batches = list_validation_batches(all_files.num_rows, self._worker.ranks)
        files = all_files.take(pa.array(np.concatenate(batches) if batches else [], pa.int64()))
        stage = data.DecodeForInference(self._spec.folder.preprocessing, MAX_PIXELS, VALIDATION_BATCH_SIZE)
        cacheable = files.num_rows / VALIDATION_BATCH_SIZE * stage.batch_bytes <= MAX_CACHED_BYTES
        cache: list[DecodedBatch] = []
        for rows in data.iter_decoded_batches(files, stage, self._spec.decode_cpus):
            images_NHWC = data.view_images(rows, self._size)
            rows = rows.drop_columns(["image"])
            cacheable = cacheable and set(RETRYABLE_STATUSES).isdisjoint(rows["status"].to_pylist())
            if cacheable:  # copies, since a view would keep its whole block in Ray's object store
                cache.append((rows.take(pa.array(range(rows.num_rows))), images_NHWC.copy()))
            else:
                cache.clear()
            yield rows, images_NHWC
        self._validation_cache = cache if cacheable else None


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def list_validation_batches(num_rows: int, ranks: Ranks) -> list[RowIndices]:
    """List the rows of a worker's validation batches; a batch has the same rows for any number of workers."""
    rows = np.arange(num_rows)
    starts = range(0, num_rows, VALIDATION_BATCH_SIZE)[ranks.rank :: ranks.world_size]
    return [rows[start : start + VALIDATION_BATCH_SIZE] for start in starts]


def is_decoded(rows: pa.Table) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return which rows have an image, bool (N,)."""
    return np.array([status == OK for status in rows["status"].to_pylist()], dtype=bool)


class LeftOutImages:
    """Collects training images that could not be decoded; each is reported once.

    Args:
        reported: rows that were reported before the run was resumed.
    """

    def __init__(self, reported: Iterable[LeftOutRow] = ()) -> None:
        self._found: dict[str, LeftOutRow] = {}  # by path
        self._reported = {row["path"]: row for row in reported}

    @property
    def reported(self) -> list[LeftOutRow]:
        """The reported rows; on the first worker."""
        return list(self._reported.values())

    def add(self, rows: pa.Table) -> None:
        """Add rows that this worker left out of its batches."""
        self._found |= {row["path"]: row for row in rows.select(["path", "status", "error"]).to_pylist()}

    def report(self, worker: TrainWorker) -> None:
        """Gather the images of all workers; the first worker writes left_out.parquet and reports the new ones."""
        gathered = worker.ranks.gather(self._found) or []
        self._found = {}
        new = {path: row for found in gathered for path, row in found.items() if path not in self._reported}
        if not new:
            return
        self._reported |= new
        worker.spec.folder.write(parquet_bytes(_build_table(self._reported)), LEFT_OUT)
        text = f"training images are left out; all are listed in {worker.spec.folder.path(LEFT_OUT)}"
        report_failed_rows(_build_table(new), text, worker.events.send)


def _build_table(rows: dict[str, LeftOutRow]) -> pa.Table:
    return pa.Table.from_pylist(sorted(rows.values(), key=lambda row: row["path"]))
