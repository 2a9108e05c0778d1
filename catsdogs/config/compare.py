"""The settings of `compare`, and the conditions of `--fail-if`."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from catsdogs.config.checks import check
from catsdogs.errors import InputError

# What `compare.json` has under `figures`. Those of pairs are about the images in both results.
PAIR_FIGURES = ("changed", "flipped", "status_changed", "mean_difference", "max_difference")
LABEL_FIGURES = ("accuracy_a", "accuracy_b", "accuracy_drop", "max_recall_drop", "mcnemar_p")
DRIFT_FIGURES = ("psi", "psi_label", "psi_width", "psi_height", "psi_size_bytes", "psi_format", "embedding_shift")
FIGURES = ("in_both", "only_in_a", "only_in_b", *PAIR_FIGURES, *LABEL_FIGURES, *DRIFT_FIGURES)

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*", re.ASCII)


class Condition(NamedTuple):
    """A condition of `--fail-if`, such as `changed>0.02`."""

    figure: str
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.figure}{self.operator}{self.threshold:g}"

    def holds(self, value: float) -> bool:
        """Return whether a figure meets the condition."""
        return OPERATORS[self.operator](value, self.threshold)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Show what changed between two outputs of score or evaluate, and how two sets of images differ."""

    a: str
    """Output of score or evaluate, or one Parquet file of their columns: what was before."""
    b: str
    """What is compared with it."""
    output: str
    """Folder or s3:// prefix for compare.json, changes.parquet and report.html."""
    fail_if: str | None = None
    """Exit with code 3 if one of these conditions holds: 'changed>0.02,accuracy_drop>0.01'."""

    def __post_init__(self) -> None:
        for condition in self.conditions:
            check(condition.figure in FIGURES, "--fail-if", f"one of {', '.join(FIGURES)}", condition.figure)

    @property
    def conditions(self) -> list[Condition]:
        """The conditions of `--fail-if`."""
        return [] if self.fail_if is None else [_parse_condition(text) for text in self.fail_if.split(",")]


def _parse_condition(text: str) -> Condition:
    found = CONDITION.fullmatch(text)
    try:
        if found and math.isfinite(threshold := float(found[3])):
            return Condition(found[1], found[2], threshold)
    except ValueError:  # 1.2.3
        pass
    raise InputError(
        f"--fail-if: expected conditions such as changed>0.02, separated by commas, with >, >=, < or <=, got {text!r}"
    )
