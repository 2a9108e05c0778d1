"""The settings of `evaluate`."""

import math
from dataclasses import dataclass

from catsdogs.config.checks import (
    PrecisionChoice,
    UseGpu,
    check,
    check_choices,
    check_label_source,
    check_min_precision,
    check_pattern,
    check_range,
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Classify labelled images, in folders or a table, and write metrics."""

    data_dir: str | None = None
    """Class folders directly, or a root: its validation/, val/ or test/, the first that exists."""
    labels: str | None = None
    """Table of path, label and perhaps split and group, .csv, .parquet or .jsonl; --data-dir is then its base."""
    group_by: str | None = None
    """Regular expression; images whose relative paths have the same first capture count as one for a mean accuracy."""
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
    calibrate: bool = False
    """Calibrate the checkpoint on these images: write temperature and precision curves to its config.json."""
    min_precision: float | None = None
    """Also write the columns confidence and decision, and measure the precision of what is accepted."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_label_source(self)
        check_pattern(self.group_by)
        check_range(self, 1, math.inf, "batch_size", "num_actors")
        check_min_precision(self.min_precision)
        expected = "no --min-precision, since thresholds are measured on other images than those they come from"
        check(not self.calibrate or self.min_precision is None, "--calibrate", expected, self.min_precision)
