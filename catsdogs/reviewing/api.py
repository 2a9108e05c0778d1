"""The function `review`. The rest of the package is imported when it is called."""

from typing import Any

from catsdogs.config import ReviewConfig
from catsdogs.progress import Progress, silent


def review(config: ReviewConfig, progress: Progress = silent) -> dict[str, Any]:
    """Pick images and write the page; return the number of `picked` images and of `candidates`.

    Raises:
        InputError: `scores` is no finished result, the class is unknown, or no row can be picked.
        RunError: a file cannot be read or written now.
    """
    from catsdogs.reviewing import pipeline

    return pipeline.review(config, progress)
