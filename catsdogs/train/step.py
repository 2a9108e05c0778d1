"""One optimizer step over all workers; the optimizer and its learning rate.

Shapes: N batch, C channels, H, W, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing
from catsdogs.images.tensors import normalize
from catsdogs.model import NUM_FEATURES, Precision, parameter_groups, training_mode
from catsdogs.vision import ResNet

MOMENTUM = 0.9


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer; its learning rate is set before every step."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr, fused=True)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=MOMENTUM, nesterov=True, fused=True)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Compute the rate of a step counted from 0 over the run: linear warm-up, then half a cosine to zero."""
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs, config.epochs / 3) * steps_per_epoch
    if step + 1 < warmup:
        return config.peak_lr * (step + 1) / warmup
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (total - warmup + 1)))


class TrainModel(Protocol):
    """What a step trains."""

    @property
    def dummy_input(self) -> torch.Tensor:
        """One row of inputs that weighs nothing, for a worker that has none."""

    def __call__(self, inputs: torch.Tensor, num_rows: int, /) -> torch.Tensor:
        """Compute logits_NK; of the inputs `num_rows` count."""


@dataclass(frozen=True)
class FullModel:
    """All layers, which see uint8 images, (N, H, W, C)."""

    model: ResNet
    wrapped: Callable[[torch.Tensor], torch.Tensor]  # as DDP or the compiler sees it
    preprocessing: Preprocessing
    device: torch.device
    precision: Precision

    @property
    def dummy_input(self) -> torch.Tensor:
        """One black image."""
        side = self.preprocessing.img_size
        return torch.zeros((1, side, side, 3), dtype=torch.uint8, device=self.device)

    def __call__(self, images_NHWC: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Compute logits_NK."""
        training_mode(self.model, num_rows)
        inputs_NCHW = normalize(images_NHWC.permute(0, 3, 1, 2), self.preprocessing.mean, self.preprocessing.std)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits_NK = self.wrapped(inputs_NCHW.contiguous(memory_format=torch.channels_last))
        return logits_NK.float()


@dataclass(frozen=True)
class HeadOnly:
    """The head alone, which sees a frozen backbone's features, float32 (N, NUM_FEATURES)."""

    wrapped: nn.Module  # as DDP sees it
    device: torch.device

    @property
    def dummy_input(self) -> torch.Tensor:
        """The features of nothing."""
        return torch.zeros((1, NUM_FEATURES), device=self.device)

    def __call__(self, features_ND: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Compute logits_NK."""
        logits_NK: torch.Tensor = self.wrapped(features_ND)
        return logits_NK


@dataclass
class TrainStep:
    """What a step needs."""

    trained: TrainModel
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    device: torch.device
    world_size: int

    def step(self, inputs: torch.Tensor, targets_N: torch.Tensor, lr: float) -> torch.Tensor:
        """Take one step on this worker's rows, which may be none.

        The gradient is the mean over the rows of all workers: DDP averages over workers, so each scales its sum by
        workers / rows.

        Args:
            inputs: of N rows, as `trained` takes them.
            targets_N: int64 class indices.

        Returns:
            float64 (3,): cross-entropy summed, rows right, rows.
        """
        num_rows = len(targets_N)
        rows_everywhere = self._rows_everywhere(num_rows)
        if not num_rows and not rows_everywhere.item():  # no worker has one: nothing to learn from
            return torch.zeros(3, dtype=torch.float64, device=self.device)
        if not num_rows:  # DDP needs every worker's backward
            inputs, targets_N = self.trained.dummy_input, torch.zeros(1, dtype=torch.int64, device=self.device)
        logits_NK = self.trained(inputs, num_rows)
        smoothing = self.config.label_smoothing
        objective = F.cross_entropy(logits_NK, targets_N, reduction="sum", label_smoothing=smoothing)
        weight = self.world_size / rows_everywhere
        self._update(objective * weight * (num_rows > 0), lr)
        return _step_sums(logits_NK.detach(), targets_N, num_rows)

    def _rows_everywhere(self, num_rows: int) -> torch.Tensor:
        total = torch.tensor(float(num_rows), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def _update(self, objective: torch.Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.config.clip_grad_norm)
        self.optimizer.step()


def _step_sums(logits_NK: torch.Tensor, targets_N: torch.Tensor, num_rows: int) -> torch.Tensor:
    logits_NK, targets_N = logits_NK[:num_rows], targets_N[:num_rows]
    loss = F.cross_entropy(logits_NK, targets_N, reduction="sum").double()
    right = (logits_NK.argmax(dim=1) == targets_N).sum().double()
    return torch.stack([loss, right, torch.full_like(loss, num_rows)])
