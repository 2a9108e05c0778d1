"""The function `evaluate`. The rest of the package is imported when it is called."""

from typing import Any

from catsdogs.config import EvaluateConfig
from catsdogs.progress import Progress, silent


def evaluate(config: EvaluateConfig, progress: Progress = silent) -> dict[str, Any]:
    """Classify every file of a labelled folder or table; return the content of `metrics.json`.

    Raises:
        InputError: the labelled images or the checkpoint cannot be used, or their classes differ. With `calibrate`, no
            image is classified or the checkpoint cannot be written; with `min_precision`, it has no calibration.
        RunError: the run failed.
    """
    from catsdogs.evaluate import driver

    return driver.evaluate(config, progress)
