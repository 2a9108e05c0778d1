"""The function `audit`. The rest of the package is imported when it is called."""

from typing import Any

from catsdogs.config import AuditConfig
from catsdogs.progress import Progress, silent


def audit(config: AuditConfig, progress: Progress = silent) -> dict[str, Any]:
    """Look at every file of a set; write tables and a report; return the content of `audit.json`.

    Raises:
        InputError: the set cannot be listed, or a table cannot be used.
        RunError: the run failed.
    """
    from catsdogs.auditing import pipeline

    return pipeline.audit(config, progress)
