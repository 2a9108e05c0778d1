"""Checks of settings, and the types and limits that several commands share."""

import math
import re
from dataclasses import fields
from typing import Any, Literal, Protocol, get_args, get_origin

from catsdogs.errors import InputError

PrecisionChoice = Literal["auto", "fp32", "bf16"]
UseGpu = Literal["auto", "true", "false"]
MIN_IMG_SIZE, MAX_IMG_SIZE = 32, 4096  # pixels a side
MAX_VIEWS = 32
DEFAULT_BATCH_SIZE = 32  # images per worker and step of training on a CPU
MAX_SHARD_SIZE_WITH_EMBEDDINGS = 100_000  # rows; a part is assembled in memory
MAX_SEED = 2**32 - 1  # the largest seed that NumPy, Python and torch all accept


class HasLabelSource(Protocol):
    """Settings of a command that takes class folders or a table of labels."""

    @property
    def data_dir(self) -> str | None:
        """Folder of class folders, or the base of a table's relative paths."""

    @property
    def labels(self) -> str | None:
        """Table of labels."""


def check(valid: bool, flag: str, expected: str, found: object) -> None:
    """Raise InputError with what was expected if a setting is not valid."""
    if not valid:
        raise InputError(f"{flag}: expected {expected}, got {found}")


def check_min_precision(value: float | None) -> None:
    """Check `--min-precision`."""
    check(value is None or 0 < value < 1, "--min-precision", "a number between 0 and 1, such as 0.95", value)


def check_needed(valid: bool, flag: str, needed: str) -> None:
    """Raise InputError if a setting is given without another that it needs."""
    if not valid:
        raise InputError(f"{flag} needs {needed}: add it, or omit {flag}")


def check_choices(config: Any) -> None:
    """Check the settings of a Literal type; from Python, they may have any value."""
    for field in fields(config):
        if get_origin(field.type) is Literal:
            *others, last = get_args(field.type)
            value = getattr(config, field.name)
            check(value in (*others, last), format_flag(field.name), f"{', '.join(others)} or {last}", repr(value))


def check_range(config: object, low: float, high: float, *names: str) -> None:
    """Check that the named settings are finite and within [low, high]; None stands for a default."""
    expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
    for name in names:
        value = getattr(config, name)
        valid = value is None or (low <= value <= high and value != math.inf)
        check(valid, format_flag(name), expected, value)


def check_label_source(config: HasLabelSource) -> None:
    """Check that there are labels: class folders, a table or both."""
    expected = "a folder of class folders, or --labels with a table"
    check(config.data_dir is not None or config.labels is not None, "--data-dir", expected, "neither")


def check_pattern(pattern: str | None) -> None:
    """Check the regular expression of `--group-by`."""
    try:
        num_captures = 1 if pattern is None else re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:  # too many repetitions, too many parentheses
        raise InputError(f"--group-by: expected a regular expression, got {pattern}: {error}") from error
    check(num_captures > 0, "--group-by", "a capture in parentheses, such as '([^/]+)/[^/]+$'", pattern)


def format_flag(name: str) -> str:
    """Format the flag of a field."""
    return f"--{name.replace('_', '-')}"


def is_name(name: str) -> bool:
    """Return whether a name is a plain folder name."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()
