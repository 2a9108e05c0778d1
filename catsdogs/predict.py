"""Compute probabilities of images, for validation, evaluation and scoring.

Shapes: N batch, H, W, C channels, D features, K classes.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from catsdogs.checkpoint import HEAD
from catsdogs.errors import InputError
from catsdogs.images import ImageArray, Preprocessing
from catsdogs.images.tensors import normalize, to_device
from catsdogs.inference_model import InferenceBackbone
from catsdogs.predictions import FloatArray
from catsdogs.process_setup import DTYPES, Precision, disable_tf32, resolve_precision

VALIDATION_BATCH_SIZE = 32  # also the default of evaluate: equal batches give equal probabilities
NUM_CHECK_IMAGES = 16  # on which bf16 is compared with fp32
MAX_CHECK_SIZE = 112  # pixels a side; the check takes 0.3 s on 2 cores
MAX_PROB_DIFFERENCE = 0.03
NUM_BATCH_SHARDS = 2  # threads that share a batch and the cores of a CPU


class Predictor:
    """A model that classifies batches of images on one device; its head computes in fp32."""

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor],
        preprocessing: Preprocessing,
        precision: Precision,
        device: torch.device,
        plain: bool = False,
    ) -> None:
        """Copy the tensors of a ResNet50; `plain` uses documented operators only, as a reference."""
        self.precision = precision
        self._device = device
        self._preprocessing = preprocessing
        disable_tf32(precision, device)
        self._backbone = InferenceBackbone(state_dict, precision, device, plain)
        head = {name: state_dict[f"{HEAD}.{name}"].to(device, copy=True) for name in ("weight", "bias")}
        self._head: Callable[[torch.Tensor], torch.Tensor] = functools.partial(F.linear, **head)
        self._head_weight_KD = head["weight"]
        num_threads = torch.get_num_threads()
        self._num_batch_shards = min(NUM_BATCH_SHARDS, num_threads)
        shard_threads = num_threads // self._num_batch_shards
        self._executor = ThreadPoolExecutor(self._num_batch_shards, "", torch.set_num_threads, (shard_threads,))

    def __call__(self, images_NHWC: ImageArray | torch.Tensor) -> FloatArray:
        """Compute softmax probabilities.

        Args:
            images_NHWC: uint8, RGB; an array, which may be read-only, or a tensor on the device.

        Returns:
            float32 (N, K); rows sum to 1.
        """
        return self.predict(images_NHWC)[0]

    def embed(self, images_NHWC: ImageArray | torch.Tensor) -> FloatArray:
        """Compute the inputs of the head, float32 (N, NUM_FEATURES)."""
        return _to_array(self._embed(images_NHWC))

    @torch.inference_mode()
    def predict(
        self, images_NHWC: ImageArray | torch.Tensor, with_features: bool = False
    ) -> tuple[FloatArray, FloatArray | None]:
        """Compute softmax probabilities, float32 (N, K), and on request the inputs of the head.

        On a GPU, the thread waits once: for the probabilities.
        """
        features_ND = self._embed(images_NHWC)
        probs_NK = compute_probs(self._head, features_ND)
        return probs_NK, _to_array(features_ND) if with_features else None

    @torch.inference_mode()
    def map_activations(self, images_NHWC: ImageArray) -> FloatArray:
        """Compute where the predicted class has its evidence, float32 (N, H / 32, W / 32): the class activation map.

        Pooling and the head are linear, so the mean of a map plus the head's bias is the logit (Zhou et al. 2016,
        arXiv 1512.04150).
        """
        features_NDHW = self._backbone.extract(self._normalize(images_NHWC)).float()
        index_N = self._head(features_NDHW.mean(dim=(2, 3))).argmax(dim=1)
        return _to_array(torch.einsum("ndhw,nd->nhw", features_NDHW, self._head_weight_KD[index_N]))

    def _embed(self, images_NHWC: ImageArray | torch.Tensor) -> torch.Tensor:
        """Compute the inputs of the head, float32 on the device.

        On a CPU, threads share the batch. If they shared each layer, every layer would wait for a core that another
        process, such as a decoder, uses: 4% of the time of scoring (measured: 2-core Zen 4, 2026-11).
        """
        if self._device.type == "cuda":
            return self._embed_shard(images_NHWC)
        shards = np.array_split(np.asarray(images_NHWC), min(self._num_batch_shards, max(1, len(images_NHWC))))
        return torch.cat(list(self._executor.map(self._embed_shard, shards)))

    @torch.inference_mode()
    def _embed_shard(self, images_NHWC: ImageArray | torch.Tensor) -> torch.Tensor:
        return self._backbone(self._normalize(images_NHWC)).float()

    def _normalize(self, images_NHWC: ImageArray | torch.Tensor) -> torch.Tensor:
        """Convert images to the backbone's inputs (N, 3, H, W)."""
        if not isinstance(images_NHWC, torch.Tensor):
            images_NHWC = to_device(images_NHWC, self._device)
        images_NCHW = normalize(images_NHWC.permute(0, 3, 1, 2), self._preprocessing.mean, self._preprocessing.std)
        return images_NCHW.to(DTYPES[self.precision], memory_format=torch.channels_last)


def compute_probs(head: Callable[[torch.Tensor], torch.Tensor], features_ND: torch.Tensor) -> FloatArray:
    """Compute softmax probabilities, float32 (N, K), from features on the head's device."""
    return _to_array(head(features_ND).softmax(dim=1))


def _to_array(tensor: torch.Tensor) -> FloatArray:
    return np.asarray(tensor.cpu().numpy())


def build_checked_predictor(
    state_dict: Mapping[str, torch.Tensor], preprocessing: Preprocessing, precision: str, device: torch.device
) -> tuple[Predictor, str]:
    """Build a predictor and describe its device and precision, such as `cpu, bf16`.

    bf16 is compared with fp32 on fixed images. If probabilities differ by more than MAX_PROB_DIFFERENCE, `auto` falls
    back to fp32; if the user chose bf16, it is kept and the description has the difference.

    Raises:
        InputError: a probability is NaN, in fp32 or in the precision that the user chose.
    """
    resolved = resolve_precision(precision, device)
    predictor = Predictor(state_dict, preprocessing, resolved, device)
    images_NHWC = draw_check_images(min(preprocessing.img_size, MAX_CHECK_SIZE))
    if resolved == "fp32":
        _check_finite(predictor(images_NHWC), "fp32")
        return predictor, f"{device.type}, fp32"
    expected_NK = Predictor(state_dict, preprocessing, "fp32", device, plain=True)(images_NHWC)
    _check_finite(expected_NK, "fp32")
    probs_NK = predictor(images_NHWC)
    difference = float(np.abs(probs_NK - expected_NK).max())
    if difference <= MAX_PROB_DIFFERENCE:  # false for NaN
        return predictor, f"{device.type}, {resolved}"
    if precision == "auto":
        predictor = Predictor(state_dict, preprocessing, "fp32", device)
        return predictor, f"{device.type}, fp32: probabilities in {resolved} differ by {difference:.2f}"
    _check_finite(probs_NK, resolved)
    return predictor, f"{device.type}, {resolved}, its probabilities differ by {difference:.2f} from those of fp32"


def _check_finite(probs_NK: FloatArray, precision: str) -> None:
    if not np.isfinite(probs_NK).all():
        raise InputError(
            f"--checkpoint: expected probabilities from 0 to 1, the model computes NaN in {precision}: its training "
            "diverged or its weights are damaged; use the checkpoint of an earlier epoch"
        )


def draw_check_images(size: int) -> ImageArray:
    """Draw the same coloured patches with noise at every call, uint8 (NUM_CHECK_IMAGES, size, size, 3)."""
    generator = torch.Generator().manual_seed(0)
    patches_NCHW = torch.rand((NUM_CHECK_IMAGES, 3, 6, 6), generator=generator) * 255
    smooth_NCHW = F.interpolate(patches_NCHW, size=(size, size), mode="bilinear")
    noise_NCHW = torch.randn(smooth_NCHW.shape, generator=generator) * 12
    images_NCHW = (smooth_NCHW + noise_NCHW).clamp_(0, 255).to(torch.uint8)
    return images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
