"""The settings of `train`."""

import math
from dataclasses import dataclass
from typing import Literal

from catsdogs.config.checks import (
    DEFAULT_BATCH_SIZE,
    MAX_IMG_SIZE,
    MAX_SEED,
    MAX_VIEWS,
    MIN_IMG_SIZE,
    PrecisionChoice,
    UseGpu,
    check,
    check_choices,
    check_label_source,
    check_needed,
    check_pattern,
    check_range,
    is_name,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune ResNet50 on labelled images, in folders or a table, with Ray Train."""

    data_dir: str | None = None
    """Root with train/ and validation/ (or val/, test/), or class folders directly; a path or URI."""
    labels: str | None = None
    """Table of path, label and perhaps split and group, .csv, .parquet or .jsonl; --data-dir is then its base."""
    group_by: str | None = None
    """Regular expression; images whose relative paths have the same first capture are in one split."""
    exclude: str | None = None
    """Table with the column path of images to leave out."""
    val_split: float = 0.15
    """Fraction of each class used for validation if the data has no validation split."""
    storage_path: str = "runs"
    """Folder or s3:// prefix that contains all runs."""
    name: str | None = None
    """Name of this run; default: a new name with the date."""
    resume: bool = False
    """Continue the named run after its last saved step."""
    save_every: float = 600.0
    """Seconds between two saves within an epoch; every finished epoch is saved, too."""
    max_failures: int = 3
    """How often the workers restart from the last saved step after one of them dies."""
    weights: str = "imagenet"
    """imagenet, none, a checkpoint folder or a ResNet50 state dict (.safetensors, .pth, .pt, .pth.tar, .ckpt, .bin)."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone trains only the new head, on features that are computed once."""
    views: int | None = None
    """With --freeze backbone: augmented views per image; default 5, without augmentation 1."""
    epochs: int = 10
    """Passes over the training images."""
    patience: int | None = None
    """Stop after this many epochs in a row without a lower validation loss; default: never."""
    batch_size: int | None = None
    """Images per worker and step; default 32, on GPUs the largest power of two up to 256 with 30 steps per epoch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9."""
    lr: float | None = None
    """Peak learning rate; default, per 32 images of the global batch: sgd 0.02 (frozen 0.1), adamw 0.001."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up before the cosine schedule, at most a third of all epochs."""
    weight_decay: float = 1e-4
    """Weight decay; not applied to norms and biases."""
    label_smoothing: float = 0.1
    """Fraction of the target probability spread over all classes."""
    class_weights: Literal["none", "auto"] = "none"
    """auto weights the loss of each class by the inverse of its number of training images."""
    clip_grad_norm: float = 5.0
    """Maximum norm of the gradient."""
    augment: Literal["none", "light", "affine"] = "light"
    """light: random resized crop and flip; affine: rotation, shift, shear, zoom and flip."""
    img_size: int = 224
    """Side length in pixels of the square images that the model takes."""
    seed: int = 0
    """Seed of the sample order, the augmentation and the new head."""
    precision: PrecisionChoice = "auto"
    """auto is bf16 on hardware that is faster with it, else fp32."""
    num_workers: int = 1
    """Number of Ray Train workers."""
    use_gpu: UseGpu = "auto"
    """auto uses one GPU per worker if the cluster has GPUs."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_label_source(self)
        check_pattern(self.group_by)
        check(0 < self.val_split < 1, "--val-split", "a fraction between 0 and 1", self.val_split)
        check_needed(not self.resume or self.name is not None, "--resume", "--name")
        check(self.name is None or is_name(self.name), "--name", "a plain folder name", repr(self.name))
        check(self.lr is None or 0 < self.lr < math.inf, "--lr", "a positive number", self.lr)
        check(self.clip_grad_norm > 0, "--clip-grad-norm", "a positive number", self.clip_grad_norm)
        check_needed(self.views is None or self.freeze == "backbone", "--views", "--freeze backbone")
        check(self.augment != "none" or self.views in (None, 1), "--views", "1 with --augment none", self.views)
        check(self.save_every > 0, "--save-every", "a positive number of seconds", self.save_every)
        check_range(self, 1, MAX_VIEWS, "views")
        check_range(self, 1, math.inf, "epochs", "patience", "batch_size", "num_workers")
        check_range(self, MIN_IMG_SIZE, MAX_IMG_SIZE, "img_size")
        check_range(self, 0, MAX_SEED, "seed")
        check_range(self, 0, 0.99, "label_smoothing")
        check_range(self, 0, math.inf, "weight_decay", "warmup_epochs", "max_failures")

    @property
    def local_batch_size(self) -> int:
        """Images per worker and step; `train.settings` chooses others than the default for GPUs."""
        return self.batch_size or DEFAULT_BATCH_SIZE

    @property
    def global_batch_size(self) -> int:
        """Images per step over all workers."""
        return self.local_batch_size * self.num_workers

    @property
    def num_views(self) -> int:
        """Views per image with a frozen backbone."""
        if self.views is not None:
            return self.views
        return 1 if self.augment == "none" else 5

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up; by default proportional to the global batch (Goyal, arXiv 1706.02677)."""
        if self.lr is not None:
            return self.lr
        base = 1e-3 if self.optimizer == "adamw" else 0.1 if self.freeze == "backbone" else 0.02
        return base * self.global_batch_size / 32
