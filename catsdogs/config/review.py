"""The settings of `review`."""

from dataclasses import dataclass
from typing import Literal

from catsdogs.config.checks import check_choices, check_range

MAX_REVIEWED = 1_000  # images of a page, which has them all; about 15 KB each


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """Pick the images that a person should look at next, and write a page to label them on."""

    scores: str
    """Finished output of score, or an output of evaluate."""
    output: str
    """Folder or s3:// prefix for review.html, review.csv and labelstudio.json."""
    strategy: Literal["uncertain", "suspect", "random"] = "uncertain"
    """uncertain: close probabilities; suspect: another label than the folder's; random: a sample."""
    n: int = 200
    """Number of images."""
    class_name: str | None = None
    """Only images of this predicted class."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 1, MAX_REVIEWED, "n")
