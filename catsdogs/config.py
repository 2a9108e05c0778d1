"""One frozen dataclass per command: the only place of a setting's default, help and check."""

import math
from dataclasses import dataclass
from typing import Literal

from catsdogs.errors import InputError

Precision = Literal["auto", "fp32", "bf16"]
UseGpu = Literal["auto", "true", "false"]
MAX_VIEWS = 32
MAX_EMBEDDED = 100_000  # rows a part with embeddings, which is put together in memory
MAX_SEED = 2**32 - 1  # what every generator takes


def _check(holds: bool, flag: str, expected: str, came: object) -> None:
    if not holds:
        raise InputError(f"{flag}: expected {expected}, got {came}")


def _check_range(flag: str, value: float, low: float, high: float = math.inf) -> None:
    expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
    _check(low <= value <= high and value != math.inf, flag, expected, value)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw labelled cats and dogs, fine-tune, evaluate and bulk-score: the whole job on one machine."""

    output: str
    """Folder to make: data, run, evaluation, scores and report.html."""
    seed: int = 0
    """Seed of the drawings and of the training."""

    def __post_init__(self) -> None:
        _check_range("--seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetch and unpack the cats and dogs photographs, safely."""

    output: str
    """Folder to make."""
    url: str = "https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip"
    """Where the zip is; a mirror's address works too."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune ResNet50 on folders of labelled images with Ray Train."""

    data_dir: str
    """Root with train/ and validation/ (or val/, test/), or class folders directly; a path or s3://."""
    val_split: float = 0.15
    """Share of each class kept for validation where the root has no validation folder."""
    storage_path: str = "runs"
    """Folder or s3:// prefix of all runs."""
    name: str | None = None
    """Name of this run; default: a fresh one from the date."""
    resume: bool = False
    """Go on with the named run at its last finished epoch."""
    max_failures: int = 3
    """How often a worker that dies restarts the group from the last finished epoch."""
    weights: str = "imagenet"
    """imagenet, none, or a ResNet50 state dict (.pth, .safetensors) or checkpoint directory."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone trains the new head only, on features that are computed once."""
    views: int | None = None
    """With --freeze backbone, augmented views of an image that are kept; default 5, without augmentation 1."""
    epochs: int = 10
    """Passes over the training rows."""
    batch_size: int = 32
    """Images per worker and step; the global batch is this times --num-workers."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9."""
    lr: float | None = None
    """Peak learning rate; default, per 32 images of the global batch: sgd 0.02 (frozen 0.1), adamw 0.001."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up before the cosine; at most a third of all."""
    weight_decay: float = 1e-4
    """Weight decay; norms and biases have none."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    clip_grad_norm: float = 5.0
    """Largest norm of the whole gradient."""
    augment: Literal["none", "light", "affine"] = "light"
    """light: random resized crop and flip; affine: rotation, shift, shear, zoom and flip."""
    img_size: int = 224
    """Pixels a side that the model sees."""
    seed: int = 0
    """Seed of order, augmentation and the new head."""
    precision: Precision = "auto"
    """auto is bf16 where the hardware is fast at it."""
    num_workers: int = 1
    """Ray Train workers."""
    use_gpu: UseGpu = "auto"
    """auto takes a GPU per worker where the cluster has them."""

    def __post_init__(self) -> None:
        _check(0 < self.val_split < 1, "--val-split", "a share between 0 and 1", self.val_split)
        _check(not self.resume or self.name is not None, "--resume", "--name of the run to go on with", "none")
        _check(self.name is None or _is_name(self.name), "--name", "a plain folder name", repr(self.name))
        for flag, value in (
            ("--epochs", self.epochs),
            ("--batch-size", self.batch_size),
            ("--num-workers", self.num_workers),
        ):
            _check_range(flag, value, 1)
        _check(self.lr is None or 0 < self.lr < math.inf, "--lr", "a positive number", self.lr)
        _check_range("--img-size", self.img_size, 32, 4096)
        _check(self.views is None or self.freeze == "backbone", "--views", "--freeze backbone with it", self.freeze)
        _check_range("--views", self.num_views, 1, MAX_VIEWS if self.augment != "none" else 1)
        _check_range("--seed", self.seed, 0, MAX_SEED)
        _check_range("--label-smoothing", self.label_smoothing, 0, 0.99)
        _check(self.clip_grad_norm > 0, "--clip-grad-norm", "a positive number", self.clip_grad_norm)
        for flag, least in (
            ("--weight-decay", self.weight_decay),
            ("--warmup-epochs", self.warmup_epochs),
            ("--max-failures", self.max_failures),
        ):
            _check_range(flag, least, 0)

    @property
    def global_batch_size(self) -> int:
        """Images per step over all workers."""
        return self.batch_size * self.num_workers

    @property
    def num_views(self) -> int:
        """Views of an image that a frozen backbone sees."""
        if self.views is not None:
            return self.views
        return 1 if self.augment == "none" else 5

    @property
    def peak_lr(self) -> float:
        """The rate after warm-up; by default it grows with the global batch (Goyal, arXiv 1706.02677)."""
        if self.lr is not None:
            return self.lr
        base = 1e-3 if self.optimizer == "adamw" else 0.1 if self.freeze == "backbone" else 0.02
        return base * self.global_batch_size / 32


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a folder of labelled images and write metrics."""

    data_dir: str
    """Class folders directly, or a root: its validation/, val/ or test/, the first that exists."""
    checkpoint: str
    """Checkpoint directory, such as runs/NAME/best."""
    output: str
    """Folder or s3:// prefix for metrics.json and predictions.parquet."""
    split: str | None = None
    """Name of another folder of the root to evaluate on."""
    batch_size: int = 32
    """Images per forward pass."""
    precision: Precision = "auto"
    """auto is bf16 where the hardware is fast at it."""
    num_actors: int | None = None
    """Model replicas; default: one per GPU, or one per machine."""
    use_gpu: UseGpu = "auto"
    """auto takes a GPU per actor where the cluster has them."""

    def __post_init__(self) -> None:
        _check_range("--batch-size", self.batch_size, 1)
        _check_range("--num-actors", 1 if self.num_actors is None else self.num_actors, 1)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Bulk-classify a folder or a bucket into Parquet with Ray Data."""

    input: str
    """Folder, prefix, one image, or a .parquet, .csv or .txt manifest of paths."""
    checkpoint: str
    """Checkpoint directory, such as runs/NAME/best."""
    output: str
    """Folder or s3:// prefix for the Parquet parts: new, empty, or of an earlier scoring."""
    limit: int | None = None
    """Score the first so many files by path."""
    batch_size: int | None = None
    """Images per forward pass; default 32, on GPUs 256."""
    precision: Precision = "auto"
    """auto is bf16 where the hardware is fast at it."""
    num_actors: int | None = None
    """Model replicas; default: one per GPU, or one per machine."""
    use_gpu: UseGpu = "auto"
    """auto takes a GPU per actor where the cluster has them."""
    shard_size: int = 10_000
    """Rows a part."""
    max_pixels: int = 178_956_970
    """Larger images get the status too_large."""
    max_error_rate: float = 1.0
    """Exit 3 where a larger share of rows has no label."""
    resume: bool = True
    """Go on with what is in --output; --no-resume wants it empty or new."""
    save_embeddings: bool = False
    """Also write the 2,048 features that the model's head sees, column embedding: 8 KB a row."""
    retry_failed: bool = False
    """Label rows again whose file changed, was missing, refused or unreadable, or crashed the decoder."""

    def __post_init__(self) -> None:
        _check_range("--limit", 1 if self.limit is None else self.limit, 1)
        _check_range("--num-actors", 1 if self.num_actors is None else self.num_actors, 1)
        _check_range("--max-error-rate", self.max_error_rate, 0, 1)
        for flag, value in (
            ("--batch-size", 1 if self.batch_size is None else self.batch_size),
            ("--shard-size", self.shard_size),
            ("--max-pixels", self.max_pixels),
        ):
            _check_range(flag, value, 1)
        if self.save_embeddings:
            _check_range("--shard-size", self.shard_size, 1, MAX_EMBEDDED)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prove that a scoring has exactly one row for every listed file, from its files alone."""

    output: str
    """Folder or s3:// prefix that score wrote."""


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()
