"""Pixels -> the columns of the output; training's validation, evaluation and scoring share it.

Shapes: N batch, H, W, C channels, K classes.
"""

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catsdogs import storage
from catsdogs.images import Preprocessing, normalize
from catsdogs.model import compute_exactly, for_inference, resolve_precision
from catsdogs.schema import OK, PREDICTIONS
from catsdogs.vision import ResNet

BATCH_SIZE = 32  # of validation and, unless told otherwise, of evaluation: the same batches give the same numbers
Images = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Probs = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Predictor:
    """A model ready to label batches of images on one device."""

    def __init__(self, model: ResNet, preprocessing: Preprocessing, precision: str, device: torch.device) -> None:
        self._device = device
        self._preprocessing = preprocessing
        self.precision = resolve_precision(precision, device)
        compute_exactly(self.precision, device)
        self._model = for_inference(model, self.precision, device)
        self._dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32

    @torch.inference_mode()
    def __call__(self, images_NHWC: Images) -> Probs:
        """Compute softmax probabilities.

        Args:
            images_NHWC: uint8 RGB; may be read-only.

        Returns:
            float32 (N, K); rows sum to 1.
        """
        images_NCHW = torch.tensor(images_NHWC, device=self._device).permute(0, 3, 1, 2)
        inputs_NCHW = normalize(images_NCHW, self._preprocessing.mean, self._preprocessing.std)
        logits_NK = self._model(inputs_NCHW.to(self._dtype, memory_format=torch.channels_last))
        return np.asarray(logits_NK.float().softmax(dim=1).cpu().numpy())


def set_threads(num_processes_here: int) -> None:
    """Share this machine's cores among the processes that run a model on it."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, num_processes_here)))


def predictions(rows: pa.Table, probs_NK: Probs, class_names: Sequence[str]) -> pa.Table:
    """Put decoded rows and their probabilities into the output's columns.

    Args:
        rows: `path`, `size_bytes`, `status`, `error`, `width`, `height`; with `true_index` where labels are
            known, else the label is the parent folder where that is a class.
        probs_NK: a row of `rows` without an image has one that is not used.
    """
    failed = pa.array(np.asarray(pc.not_equal(rows["status"], OK)))
    index = probs_NK.argmax(axis=1)
    names = np.array(class_names, dtype=object)
    width = probs_NK.shape[1]
    offsets = pa.array(np.arange(0, probs_NK.size + 1, width, dtype=np.int32), mask=None)
    columns = {
        "label": pa.array(names[index], pa.string()),
        "index": pa.array(index.astype(np.int32)),
        "prob": pa.array(probs_NK.max(axis=1, initial=0.0)),
        "probs": pa.ListArray.from_arrays(offsets, pa.array(probs_NK.ravel())),
    }
    nulled = {name: pc.if_else(failed, pa.scalar(None, column.type), column) for name, column in columns.items()}
    kept = {name: rows[name] for name in ("path", "status", "error", "width", "height", "size_bytes")}
    table = kept | nulled | {"true_label": true_labels(rows, class_names)}
    return pa.table({field.name: table[field.name] for field in PREDICTIONS}).cast(PREDICTIONS)


def true_labels(rows: pa.Table, class_names: Sequence[str]) -> pa.Array:
    """Name the class that each file is known to be of; null where it is not."""
    if "true_index" in rows.column_names:
        return pa.array([class_names[i] for i in rows["true_index"].to_numpy()], pa.string())
    known = set(class_names)
    folders = [storage.parent_name(path) for path in rows["path"].to_pylist()]
    return pa.array([folder if folder in known else None for folder in folders], pa.string())
