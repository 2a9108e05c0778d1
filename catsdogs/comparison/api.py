"""The function `compare`. The rest of the package is imported when it is called."""

from typing import Any

from catsdogs.config import CompareConfig
from catsdogs.progress import Progress, silent


def compare(config: CompareConfig, progress: Progress = silent) -> dict[str, Any]:
    """Compare two results; return the content of `compare.json`.

    Raises:
        InputError: one of them is no finished result, or is damaged; their classes differ; nothing can be compared; a
            figure of `--fail-if` cannot be computed.
        RunError: a file cannot be read or written now.
    """
    from catsdogs.comparison import pipeline

    return pipeline.compare(config, progress)
