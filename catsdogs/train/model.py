"""Model, optimizer and learning rate of a training step.

Shapes: N batch or rows, H, W, C channels, K classes.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing
from catsdogs.images.tensors import normalize
from catsdogs.process_setup import Precision
from catsdogs.resnet import ResNet50, group_parameters, set_train_mode

logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor], torch.Tensor]

MOMENTUM = 0.9
# Compiling takes 33 to 40 s. In batches of 256 it saves 0.08 ms per image, because fused kernels access memory less
# often: an H100 trains 5,660 images/s, otherwise 3,900 (measured: bf16, torch 2.11, 2026-11). Smaller batches gain most
# of what compiling brings from the CUDA graph of the step.
MIN_COMPILED_BATCH_SIZE, MIN_COMPILED_IMAGES = 128, 1_000_000


@dataclass(frozen=True)
class FullModel:
    """A model whose layers are all trained, with normalization and autocast; `forward` is `model`, wrapped."""

    model: ResNet50
    forward: Forward
    preprocessing: Preprocessing
    precision: Precision

    def __call__(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, K), float32, of uint8 images."""
        set_train_mode(self.model, len(images_NHWC))
        inputs_NCHW = normalize(images_NHWC.permute(0, 3, 1, 2), self.preprocessing.mean, self.preprocessing.std)
        with torch.autocast(images_NHWC.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits_NK = self.forward(inputs_NCHW.contiguous(memory_format=torch.channels_last))
        return logits_NK.float()


def should_compile(config: TrainConfig, device: torch.device, num_rows: int, num_finished_epochs: int) -> bool:
    """Return whether the remaining images repay compiling; compiling on several workers has not been measured."""
    num_images = (config.epochs - num_finished_epochs) * num_rows
    is_large = config.local_batch_size >= MIN_COMPILED_BATCH_SIZE and num_images >= MIN_COMPILED_IMAGES
    return device.type == "cuda" and config.num_workers == 1 and is_large


class CompiledModel:
    """A module that is compiled to fused kernels at the first batch of `batch_size`.

    Batches of another size use the module itself, as do all batches if compiling fails.
    """

    def __init__(self, module: Forward, batch_size: int, report: Callable[[str], None]) -> None:
        self._module = module
        self._batch_size = batch_size
        self._report = report
        self._compiled: Forward | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the module's outputs."""
        if len(inputs) != self._batch_size:
            return self._module(inputs)
        if self._compiled is None:
            return self._compile(inputs)
        return self._compiled(inputs)

    def _compile(self, inputs: torch.Tensor) -> torch.Tensor:
        self._report("compiling the model, which takes about a minute")
        self._compiled = torch.compile(self._module, dynamic=False)
        try:
            return self._compiled(inputs)
        except Exception as error:  # no C compiler or Triton, or an error in one of them
            logger.debug("torch.compile failed", exc_info=True)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._report(f"training without torch.compile, which is slower: {reason}")
            self._compiled = self._module
            return self._module(inputs)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters; each step sets its learning rate."""
    groups = group_parameters(model, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, device: torch.device) -> None:
    """Set the learning rate of the next step: on a GPU in a tensor, from which a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if device.type != "cuda":
            group["lr"] = lr
            continue
        if not isinstance(group["lr"], torch.Tensor) or group["lr"].device.type != "cuda":  # also of a resumed run
            group["lr"] = torch.zeros((), device=device)
        group["lr"].fill_(lr)


def compute_class_weights(targets_N: npt.NDArray[np.int32]) -> torch.Tensor:
    """Compute weights that give all classes the same share of the loss: N / (K n_k), float32 (K,).

    The mean over the rows is 1. Source: King and Zeng, Political Analysis 9(2), 2001; scikit-learn's `balanced`.
    """
    counts_K = np.bincount(targets_N)
    return torch.tensor(len(targets_N) / (len(counts_K) * counts_K), dtype=torch.float32)


def describe_class_weights(weights: Sequence[float], class_names: Sequence[str]) -> str:
    """Describe the smallest and the largest weight."""
    ordered = sorted(zip(weights, class_names, strict=True))
    (low, frequent), (high, rare) = ordered[0], ordered[-1]
    return f"class weights from {low:.3g} ({frequent}) to {high:.3g} ({rare})"


def compute_learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Compute the learning rate of a step of the run, from 0: linear warm-up, then half a cosine down to zero."""
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs, config.epochs / 3) * steps_per_epoch
    if step + 1 < warmup:
        return config.peak_lr * (step + 1) / warmup
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (total - warmup + 1)))
