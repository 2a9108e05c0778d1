"""The functions `score` and `verify`. The rest of the package is imported when they are called."""

from typing import Any

from catsdogs.config import ScoreConfig, VerifyConfig
from catsdogs.progress import Progress, silent


def score(config: ScoreConfig, progress: Progress = silent) -> dict[str, Any]:
    """Classify every listed file whose row is missing, outdated, or requested again by `--retry-failed`.

    Returns:
        The content of `_summary.json`.

    Raises:
        InputError: the input, the checkpoint or the output cannot be used.
        RunError: the run failed; finished parts are kept, and the same call resumes.
    """
    from catsdogs.score import pipeline

    return pipeline.score(config, progress)


def verify(config: VerifyConfig, progress: Progress = silent) -> dict[str, Any]:
    """Audit a finished output, its records and its summary; return the counts of its rows.

    Raises:
        InputError: there is no output of a scoring run.
        RunError: the first difference that was found.
    """
    from catsdogs.score import audit

    return audit.verify(config, progress)
