"""The errors that catsdogs raises on purpose; anything else is a bug of ours.

CatsdogsError
├── InputError     the user's input is wrong; exit 2
└── RunError       the run failed, what is done is kept; exit 1

Each takes exactly one message, so that it survives pickling between processes. The message names the
setting or path, what was expected, what came, and what to do.
"""


class CatsdogsError(Exception):
    """Any failure that catsdogs explains in one line."""


class InputError(CatsdogsError):
    """What the user gave cannot be used as it is."""


class RunError(CatsdogsError):
    """The run could not go on; what it had finished is kept."""
