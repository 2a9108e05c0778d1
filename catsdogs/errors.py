"""The errors that catsdogs raises on purpose. Any other exception is a bug.

CatsdogsError
├── InputError     the user's input is wrong; exit 2
└── RunError       the run failed, finished work is kept; exit 1
    └── NotRetryableError   another attempt of the same command would fail in the same way

Each takes exactly one message, so that it can be pickled between processes. The message states the setting or path,
what was expected, what was found, and what to do. It is shortened, and the queries of URLs in it are removed, because
it may quote a path or another error.
"""

from catsdogs.text import redact_queries, shorten

# A bug of a program. Code that catches whatever another package raises does not catch these.
PROGRAMMING_ERRORS = (AssertionError, AttributeError, NameError, TypeError)


class CatsdogsError(Exception):
    """A failure that its message explains in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(shorten(redact_queries(message)))


class InputError(CatsdogsError):
    """The user's input cannot be used."""


class RunError(CatsdogsError):
    """The run failed; finished work is kept."""


class NotRetryableError(RunError):
    """The run failed, and restarted workers would fail in the same way: the disk is full, or another run took over."""
