"""Classify exceptions that come out of Ray: a CatsdogsError, a bug in catsdogs, or a failure of Ray or a machine.

What arrives in the driver (Ray 2.60, `raise_original_map_exception`):
    an exception in a task or an actor's method   RayTaskError, the exception is its `cause`
    an exception in an actor's constructor        ActorDiedError with `actor_init_failed`, the exception is text
    a process that dies again and again           ray.data.exceptions.ExecutionTimeoutError
    a worker of Ray Train that fails              an error of Ray Train, the exception is its `base_exc`
"""

import logging
import re
import traceback

from catsdogs.errors import CatsdogsError, RunError

logger = logging.getLogger(__name__)

# No memory to fork, a full disk, a lost connection; a lost or full GPU. Torch's classes are given by name, because the
# driver does not import torch.
MACHINE_ERRORS = (OSError, MemoryError)
# Storage reports these itself, so one that gets here is a bug.
BUG_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
MACHINE_ERROR_NAMES = (
    *("torch.AcceleratorError", "torch.OutOfMemoryError"),
    *("torch.distributed.DistBackendError", "torch.distributed.DistNetworkError", "torch.distributed.DistStoreError"),
)
# What Ray adds to a traceback: colours, its own frames, and advice about its retries, also to the message.
RAY_NOISE = re.compile(
    r'\x1b\[\d+m|  File "[^"\n]*\b(?:site-packages|python)/ray/[^"\n]*".*\n(?:    .*\n)*'
    r"|\nFailed to [^\n]* attempts \((?s:.*)"
)


class RetryableError(RunError):
    """Ray or a machine failed: another attempt may succeed."""


def unwrap_ray_error(error: Exception) -> Exception:
    """Return the cause of an exception that came out of Ray.

    A CatsdogsError; or a bug, with the traceback of the process that raised it as a note; or a RetryableError.
    """
    cause = _find_cause(error)
    if cause is not error:
        cause.args = tuple(RAY_NOISE.sub("", arg) if isinstance(arg, str) else arg for arg in cause.args)
    if isinstance(cause, CatsdogsError):
        return cause
    if _is_machine_error(cause):
        return RetryableError(traceback.format_exception_only(cause)[0].splitlines()[0])
    if _is_ray_error(cause) and not _is_raised_by_constructor(cause):
        return RetryableError((str(error).strip().splitlines() or [type(error).__name__])[-1])
    if cause is not error:
        cause.add_note(RAY_NOISE.sub("", str(error)))
    return cause


def to_run_error(error: Exception, what: str, kept: str) -> Exception:
    """Return what a command raises for an exception that came out of Ray.

    Args:
        what: the work that failed, for the message.
        kept: what is kept of it, and how to resume.

    Returns:
        A CatsdogsError whose message ends with `kept`, or the bug itself with `kept` as a note.
    """
    logger.debug("%s failed", what, exc_info=error)
    cause = unwrap_ray_error(error)
    if isinstance(cause, RetryableError):
        return RunError(f"{what} failed: {cause}; {kept}")
    if isinstance(cause, CatsdogsError):
        return type(cause)(f"{cause}; {kept}")
    cause.add_note(f"{what} failed because of a bug in catsdogs; {kept}")
    return cause


def _find_cause(error: Exception) -> Exception:
    """Return the exception inside Ray's wrappers; the error itself if there is none."""
    inner: object = error
    while isinstance(inner, Exception):
        if not _is_ray_error(inner) or _is_raised_by_constructor(inner):
            return inner
        wrapped = [getattr(inner, name, None) for name in ("cause", "base_exc", "__cause__")]
        inner = next((one for one in wrapped if isinstance(one, Exception)), None)
    return error


def _is_machine_error(error: Exception) -> bool:
    if isinstance(error, MACHINE_ERRORS):
        return not isinstance(error, BUG_ERRORS)
    return f"{type(error).__module__}.{type(error).__qualname__}" in MACHINE_ERROR_NAMES


def _is_raised_by_constructor(error: Exception) -> bool:
    return bool(getattr(error, "actor_init_failed", False))


def _is_ray_error(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"
