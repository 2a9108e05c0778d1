"""Logging of the command line and of Ray's worker processes.

The library only creates loggers. A command calls `configure_logging`, which adds one handler to the `catsdogs`
logger: it shows warnings as one line each or, if verbose, every record with its traceback. Records are escaped, because
they contain file names.
"""

import logging
import os
from typing import Any

from catsdogs.text import escape_invisible, format_line, redact_queries

LOG_VARIABLE = "CATSDOGS_LOG"  # an environment variable; "debug" is the same as --verbose
DEBUG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def is_verbose() -> bool:
    """Whether the environment switches debug logs on."""
    return os.environ.get(LOG_VARIABLE, "").lower() == "debug"


def configure_logging() -> logging.Handler:
    """Add the handler for stderr, and return it."""
    handler = logging.StreamHandler()
    handler.setFormatter(_DebugFormatter(DEBUG_FORMAT) if is_verbose() else _LineFormatter())
    logger = logging.getLogger("catsdogs")
    logger.setLevel(logging.DEBUG if is_verbose() else logging.WARNING)
    logger.addHandler(handler)
    if not is_verbose():
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where HOME cannot be written
    return handler


def worker_runtime_env() -> dict[str, Any]:
    """Build the part of Ray's `runtime_env` that makes workers log into Ray's files; empty if not verbose."""
    if not is_verbose():
        return {}
    # No `env_vars`: Ray refuses a variable that the `runtime_env` of the job has, too.
    return {"worker_process_setup_hook": "catsdogs.logs.configure_debug_logging"}


def configure_debug_logging() -> None:
    """Configure debug logs in a worker process of Ray."""
    os.environ[LOG_VARIABLE] = "debug"
    configure_logging()


def escape_lines(text: str) -> str:
    """Escape a text and remove the queries of URLs, but keep its line breaks."""
    return "\n".join(map(escape_invisible, redact_queries(text).split("\n")))


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return format_line(f"catsdogs: {record.getMessage()}")


class _DebugFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_lines(super().format(record))
