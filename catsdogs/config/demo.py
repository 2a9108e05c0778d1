"""The settings of `demo` and `download`."""

from dataclasses import dataclass

from catsdogs.config.checks import MAX_SEED, check_range


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw labelled cats and dogs, fine-tune, evaluate and bulk-score them on one machine."""

    output: str
    """New folder for data, run, evaluation, scores and report.html."""
    seed: int = 0
    """Seed of the images and of training."""

    def __post_init__(self) -> None:
        check_range(self, 0, MAX_SEED, "seed")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Download and safely unpack the cats and dogs photographs."""

    output: str
    """New or empty folder."""
    url: str = "https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip"
    """URL of the zip, or of a mirror."""
