"""Pixels -> the columns of the output; training's validation, evaluation and scoring share it.

Shapes: N batch, H, W, C channels, K classes.
"""

import contextlib
import copy
import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn

from catsdogs import storage
from catsdogs.errors import RunError
from catsdogs.fused import fused
from catsdogs.images import Preprocessing
from catsdogs.images.tensors import normalize, to_device
from catsdogs.model import DTYPES, Precision, backbone_for_inference, disable_tf32, resolve_precision
from catsdogs.schema import OK, PREDICTIONS, WITH_EMBEDDINGS
from catsdogs.vision import ResNet

VALIDATION_BATCH_SIZE = (
    32  # of validation and, unless told otherwise, of evaluation: the same batches give the same numbers
)
ImageArray = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
NUM_CHECK_IMAGES = 16  # pictures on which bf16 is compared with fp32
MAX_CHECK_SIZE = 112  # pixels a side of them: 0.3 s of two cores
MAX_PROB_DIFFERENCE = 0.03  # of a probability
NUM_BATCH_SHARDS = 2  # threads that share a batch on a CPU; each has its part of the cores
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
MAX_INT32 = 2**31 - 1
FeatureArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
ProbArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Predictor:
    """A model ready to label batches of images on one device; its head computes in fp32.

    `plain` keeps torch's own layers, which others are compared with.
    """

    def __init__(
        self,
        model: ResNet,
        preprocessing: Preprocessing,
        precision: Precision,
        device: torch.device,
        plain: bool = False,
    ) -> None:
        self.precision = precision
        self._device = device
        self._preprocessing = preprocessing
        self._head = copy.deepcopy(model.fc).requires_grad_(False).to(device)
        disable_tf32(precision, device)
        backbone = backbone_for_inference(model, precision, device)
        self._backbone = backbone if plain else fused(backbone)
        num_threads = torch.get_num_threads()
        self._num_batch_shards = min(NUM_BATCH_SHARDS, num_threads)
        share = num_threads // self._num_batch_shards
        self._executor = ThreadPoolExecutor(
            self._num_batch_shards, initializer=torch.set_num_threads, initargs=(share,)
        )

    def __call__(self, images_NHWC: ImageArray | torch.Tensor) -> ProbArray:
        """Compute softmax probabilities.

        Args:
            images_NHWC: uint8 RGB, an array that may be read-only or a tensor on the device.

        Returns:
            float32 (N, K); rows sum to 1.
        """
        return self.label(self.embed(images_NHWC))

    def embed(self, images_NHWC: ImageArray | torch.Tensor) -> FeatureArray:
        """Compute what the head sees, float32 (N, NUM_FEATURES).

        Were each layer shared instead of the batch, all cores would wait for the one on which another process runs,
        such as a decoder: 4% of the time of scoring (2-core Zen 4, 2026-11).
        """
        if self._device.type == "cuda":
            return self._embed(images_NHWC)
        parts = np.array_split(np.asarray(images_NHWC), min(self._num_batch_shards, max(1, len(images_NHWC))))
        return np.concatenate(list(self._executor.map(self._embed, parts)))

    @torch.inference_mode()
    def _embed(self, images_NHWC: ImageArray | torch.Tensor) -> FeatureArray:
        if not isinstance(images_NHWC, torch.Tensor):
            images_NHWC = to_device(images_NHWC, self._device)
        images_NCHW = images_NHWC.permute(0, 3, 1, 2)
        inputs_NCHW = normalize(images_NCHW, self._preprocessing.mean, self._preprocessing.std)
        inputs_NCHW = inputs_NCHW.to(DTYPES[self.precision], memory_format=torch.channels_last)
        return np.asarray(self._backbone(inputs_NCHW).float().cpu().numpy())

    @torch.inference_mode()
    def label(self, features_ND: FeatureArray) -> ProbArray:
        """Compute softmax probabilities, float32 (N, K), from features."""
        return compute_probs(self._head, torch.tensor(features_ND, device=self._device))


def build_checked_predictor(
    model: ResNet, preprocessing: Preprocessing, precision: str, device: torch.device
) -> tuple[Predictor, str]:
    """Make a predictor, and say what it computes with.

    In bf16 the probabilities of fixed pictures are compared with those of fp32: where they differ too much, `auto`
    takes fp32. Up to d no label differs where the two best of fp32 are more than 2 d apart.
    """
    chosen = resolve_precision(precision, device)
    predictor = Predictor(model, preprocessing, chosen, device)
    device_precision = f"{device.type}, {chosen}"
    if chosen == "fp32":
        return predictor, device_precision
    reference = Predictor(model, preprocessing, "fp32", device, plain=True)
    images_NHWC = _draw_check_images(min(preprocessing.img_size, MAX_CHECK_SIZE))
    difference = float(np.abs(predictor(images_NHWC) - reference(images_NHWC)).max())
    if difference <= MAX_PROB_DIFFERENCE:  # not so where one of them is no number
        return predictor, device_precision
    if precision == "auto":
        reference = Predictor(model, preprocessing, "fp32", device)
        return reference, f"{device.type}, fp32: probabilities in {chosen} differ by {difference:.2f}"
    return predictor, f"{device_precision}, its probabilities differ by {difference:.2f} from those of fp32"


def compute_probs(head: nn.Module, features_ND: torch.Tensor) -> ProbArray:
    """Compute softmax probabilities, float32 (N, K), from features."""
    return np.asarray(head(features_ND).softmax(dim=1).cpu().numpy())


def _draw_check_images(size: int) -> ImageArray:
    """Draw patches of colour with noise, always the same, uint8 (NUM_CHECKED, S, S, 3)."""
    generator = torch.Generator().manual_seed(0)
    patches_NCHW = torch.rand((NUM_CHECK_IMAGES, 3, 6, 6), generator=generator) * 255
    smooth_NCHW = F.interpolate(patches_NCHW, size=(size, size), mode="bilinear")
    noise_NCHW = torch.randn(smooth_NCHW.shape, generator=generator) * 12
    images_NCHW = (smooth_NCHW + noise_NCHW).clamp_(0, 255).to(torch.uint8)
    return images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()


def select_device(gpus: Sequence[object]) -> torch.device:
    """Take the GPU that Ray gave this process, else the CPU.

    Raises:
        RunError: torch sees no GPU.
    """
    if gpus and not torch.cuda.is_available():
        raise RunError(f"Ray counts GPU {gpus}, which torch {torch.__version__} cannot use: install torch with CUDA")
    return torch.device("cuda" if gpus else "cpu")


def configure_threads_and_malloc(num_processes_here: int) -> None:
    """Share this machine's cores among the processes that run a model on it; keep the memory that layers free.

    glibc gives large blocks back to the kernel, which clears the next ones page by page: 10% of the time of scoring and
    6% of that of training (2-core Zen 4, 2026-11).
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, num_processes_here)))
    with contextlib.suppress(AttributeError):  # other C libraries lack it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MAX_INT32)


def build_predictions(
    rows: pa.Table, probs_NK: ProbArray, class_names: Sequence[str], embeddings_ND: FeatureArray | None = None
) -> pa.Table:
    """Put decoded rows and their probabilities into the output's columns.

    Args:
        rows: `path`, `size_bytes`, `status`, `error`, `width`, `height`; with `true_index` where labels are
            known, else the label is the parent folder where that is a class.
        probs_NK: a row of `rows` without an image has one that is not used.
        embeddings_ND: become a column where they are given.
    """
    failed = pa.array(np.asarray(pc.not_equal(rows["status"], OK)))
    index = probs_NK.argmax(axis=1)
    names = np.array(class_names, dtype=object)
    columns = {
        "label": pa.array(names[index], pa.string()),
        "index": pa.array(index.astype(np.int32)),
        "prob": pa.array(probs_NK.max(axis=1, initial=0.0)),
        "probs": _lists(probs_NK),
    }
    if embeddings_ND is not None:
        columns["embedding"] = _lists(embeddings_ND)
    nulled = {name: pc.if_else(failed, pa.scalar(None, column.type), column) for name, column in columns.items()}
    kept = {name: rows[name] for name in ("path", "status", "error", "width", "height", "size_bytes")}
    table = kept | nulled | {"true_label": true_labels(rows, class_names)}
    schema = PREDICTIONS if embeddings_ND is None else WITH_EMBEDDINGS
    return pa.table({field.name: table[field.name] for field in schema}).cast(schema)


def _lists(values_NM: FeatureArray) -> pa.Array:
    offsets = np.arange(0, values_NM.size + 1, values_NM.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_NM.ravel()))


def true_labels(rows: pa.Table, class_names: Sequence[str]) -> pa.Array:
    """Name the class that each file is known to be of; null where it is not."""
    if "true_index" in rows.column_names:
        return pa.array([class_names[i] for i in rows["true_index"].to_numpy()], pa.string())
    known = set(class_names)
    folders = [storage.parent_name(path) for path in rows["path"].to_pylist()]
    return pa.array([folder if folder in known else None for folder in folders], pa.string())
