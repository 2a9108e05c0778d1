"""The function `train`. The rest of the package is imported when it is called."""

from dataclasses import dataclass

from catsdogs.config import TrainConfig
from catsdogs.progress import Progress, silent


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    uri: str
    val_accuracy: float
    best_epoch: int


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Fine-tune ResNet50 on the workers of a Ray cluster.

    Raises:
        InputError: the settings or the data cannot be used.
        RunError: the run failed; saved epochs are kept.
    """
    from catsdogs.train import driver

    return driver.train(config, progress)
