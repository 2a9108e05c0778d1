"""The settings of each command, one frozen dataclass each. The command line is derived from them."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from catsdogs.errors import InputError

PrecisionChoice = Literal["auto", "fp32", "bf16"]
UseGpu = Literal["auto", "true", "false"]
MIN_IMG_SIZE, MAX_IMG_SIZE = 32, 4096  # pixels a side
MAX_VIEWS = 32
DEFAULT_BATCH_SIZE = 32  # images per worker and step of training on a CPU
MAX_SHARD_SIZE_WITH_EMBEDDINGS = 100_000  # rows; a part is assembled in memory
MAX_SEED = 2**32 - 1  # the largest seed that NumPy, Python and torch all accept


def _check(valid: bool, flag: str, expected: str, found: object) -> None:
    if not valid:
        raise InputError(f"{flag}: expected {expected}, got {found}")


def _check_needed(valid: bool, flag: str, needed: str) -> None:
    if not valid:
        raise InputError(f"{flag} needs {needed}: add it, or omit {flag}")


def _check_choices(config: Any) -> None:
    """Check the settings of a Literal type; from Python, they may have any value."""
    for field in fields(config):
        if get_origin(field.type) is Literal:
            *others, last = get_args(field.type)
            value = getattr(config, field.name)
            _check(value in (*others, last), _format_flag(field.name), f"{', '.join(others)} or {last}", repr(value))


def _check_range(config: object, low: float, high: float, *names: str) -> None:
    """Check that the named settings are finite and within [low, high]; None stands for a default."""
    expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
    for name in names:
        value = getattr(config, name)
        valid = value is None or (low <= value <= high and value != math.inf)
        _check(valid, _format_flag(name), expected, value)


def _check_label_source(config: "TrainConfig | EvaluateConfig") -> None:
    expected = "a folder of class folders, or --labels with a table"
    _check(config.data_dir is not None or config.labels is not None, "--data-dir", expected, "neither")


def _check_pattern(pattern: str | None) -> None:
    try:
        num_captures = 1 if pattern is None else re.compile(pattern).groups
    except re.error as error:
        raise InputError(f"--group-by: expected a regular expression, got {pattern}: {error}") from error
    _check(num_captures > 0, "--group-by", "a capture in parentheses, such as '([^/]+)/[^/]+$'", pattern)


def _format_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw labelled cats and dogs, fine-tune, evaluate and bulk-score them on one machine."""

    output: str
    """New folder for data, run, evaluation, scores and report.html."""
    seed: int = 0
    """Seed of the images and of training."""

    def __post_init__(self) -> None:
        _check_range(self, 0, MAX_SEED, "seed")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Download and safely unpack the cats and dogs photographs."""

    output: str
    """New or empty folder."""
    url: str = "https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip"
    """URL of the zip, or of a mirror."""


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
    """Continue the named run after its last saved epoch."""
    max_failures: int = 3
    """How often the workers restart from the last saved epoch after one of them dies."""
    weights: str = "imagenet"
    """imagenet, none, a checkpoint folder or a ResNet50 state dict (.safetensors, .pth, .pt, .pth.tar, .ckpt, .bin)."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone trains only the new head, on features that are computed once."""
    views: int | None = None
    """With --freeze backbone: augmented views per image; default 5, without augmentation 1."""
    epochs: int = 10
    """Passes over the training images."""
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
        _check_choices(self)
        _check_label_source(self)
        _check_pattern(self.group_by)
        _check(0 < self.val_split < 1, "--val-split", "a fraction between 0 and 1", self.val_split)
        _check_needed(not self.resume or self.name is not None, "--resume", "--name")
        _check(self.name is None or _is_name(self.name), "--name", "a plain folder name", repr(self.name))
        _check(self.lr is None or 0 < self.lr < math.inf, "--lr", "a positive number", self.lr)
        _check(self.clip_grad_norm > 0, "--clip-grad-norm", "a positive number", self.clip_grad_norm)
        _check_needed(self.views is None or self.freeze == "backbone", "--views", "--freeze backbone")
        _check(self.augment != "none" or self.views in (None, 1), "--views", "1 with --augment none", self.views)
        _check_range(self, 1, MAX_VIEWS, "views")
        _check_range(self, 1, math.inf, "epochs", "batch_size", "num_workers")
        _check_range(self, MIN_IMG_SIZE, MAX_IMG_SIZE, "img_size")
        _check_range(self, 0, MAX_SEED, "seed")
        _check_range(self, 0, 0.99, "label_smoothing")
        _check_range(self, 0, math.inf, "weight_decay", "warmup_epochs", "max_failures")

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


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Classify labelled images, in folders or a table, and write metrics."""

    data_dir: str | None = None
    """Class folders directly, or a root: its validation/, val/ or test/, the first that exists."""
    labels: str | None = None
    """Table of path, label and perhaps split, .csv, .parquet or .jsonl; --data-dir is then its base."""
    exclude: str | None = None
    """Table with the column path of images to leave out."""
    checkpoint: str
    """Checkpoint folder, such as runs/NAME/best."""
    output: str
    """Folder or s3:// prefix for metrics.json and predictions.parquet."""
    split: str | None = None
    """Name of the folder of the root, or of the split of the table, to evaluate on."""
    batch_size: int = 32
    """Images per forward pass."""
    precision: PrecisionChoice = "auto"
    """auto is bf16 on hardware that is faster with it, else fp32."""
    num_actors: int | None = None
    """Number of model replicas (two actors each on GPUs); default: one per GPU, or one per machine without GPUs."""
    use_gpu: UseGpu = "auto"
    """auto uses one GPU per replica if the cluster has GPUs."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_label_source(self)
        _check_range(self, 1, math.inf, "batch_size", "num_actors")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Bulk-classify a folder or a bucket into Parquet with Ray Data."""

    input: str
    """Folder, prefix, one image, or a .parquet, .csv, .tsv or .txt list of paths."""
    checkpoint: str
    """Checkpoint folder, such as runs/NAME/best."""
    output: str
    """Folder or s3:// prefix for the Parquet parts: new, empty, or of an earlier run."""
    allow_schemes: str | None = None
    """Schemes that paths in a path list may have beside the list's own, such as s3,https; file is this machine."""
    limit: int | None = None
    """Score only this many files, the first in path order."""
    batch_size: int | None = None
    """Images per forward pass; default 32, on a GPU 256."""
    precision: PrecisionChoice = "auto"
    """auto is bf16 on hardware that is faster with it, else fp32."""
    num_actors: int | None = None
    """Number of model replicas (two actors each on GPUs); default: one per GPU, or one per machine without GPUs."""
    use_gpu: UseGpu = "auto"
    """auto uses one GPU per replica if the cluster has GPUs."""
    shard_size: int = 10_000
    """Rows per part, the Parquet file of one shard."""
    max_pixels: int = 178_956_970
    """Images with more pixels get the status too_large."""
    max_error_rate: float = 1.0
    """Exit with code 3 if a larger fraction of images is not classified."""
    resume: bool = True
    """Continue an unfinished run in --output; --no-resume needs a new or empty one."""
    save_embeddings: bool = False
    """Also write the 2,048 input features of the model's head as the column embedding, 8 KB per row."""
    retry_failed: bool = False
    """Score rows again whose status is changed, not_found, access_denied, read_error or decoder_crash."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, 1, math.inf, "limit", "batch_size", "num_actors", "shard_size", "max_pixels")
        _check_range(self, 0, 1, "max_error_rate")
        fits = not self.save_embeddings or self.shard_size <= MAX_SHARD_SIZE_WITH_EMBEDDINGS
        expected = f"at most {MAX_SHARD_SIZE_WITH_EMBEDDINGS} with --save-embeddings"
        _check(fits, "--shard-size", expected, self.shard_size)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Verify from its files alone that an output of score has exactly one row per listed file."""

    output: str
    """Folder or s3:// prefix written by score."""


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()
