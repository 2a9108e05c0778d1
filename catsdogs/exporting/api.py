"""The function `export`. The rest of the package is imported when it is called."""

from typing import Any

from catsdogs.config import ExportConfig
from catsdogs.progress import Progress, silent


def export(config: ExportConfig, progress: Progress = silent) -> dict[str, Any]:
    """Write a checkpoint as a graph whose probabilities equal those of `score`; return the content of `export.json`.

    Raises:
        InputError: the checkpoint cannot be used, or the packages of the format are not installed.
        RunError: the probabilities of the graph differ; nothing is written.
    """
    from catsdogs.exporting import pipeline

    return pipeline.export(config, progress)
