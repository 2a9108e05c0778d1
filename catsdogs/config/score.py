"""The settings of `score` and `verify`."""

import math
from dataclasses import dataclass

from catsdogs.config.checks import (
    MAX_SHARD_SIZE_WITH_EMBEDDINGS,
    PrecisionChoice,
    UseGpu,
    check,
    check_choices,
    check_min_precision,
    check_range,
)


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
    min_precision: float | None = None
    """Also write the columns confidence and decision: the class where its precision is at least this, else review."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 1, math.inf, "limit", "batch_size", "num_actors", "shard_size", "max_pixels")
        check_range(self, 0, 1, "max_error_rate")
        check_min_precision(self.min_precision)
        fits = not self.save_embeddings or self.shard_size <= MAX_SHARD_SIZE_WITH_EMBEDDINGS
        expected = f"at most {MAX_SHARD_SIZE_WITH_EMBEDDINGS} with --save-embeddings"
        check(fits, "--shard-size", expected, self.shard_size)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Verify from its files alone that an output of score has exactly one row per listed file."""

    output: str
    """Folder or s3:// prefix written by score."""
