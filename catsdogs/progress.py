"""What a long job tells while it runs; who calls it decides how it is shown."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Work of one stage that is `done` out of `total`, which may be unknown yet."""

    stage: str
    done: int
    total: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One line that stays."""

    text: str


Progress = Callable[[StageProgress | Message], None]


def silent(_: StageProgress | Message) -> None:
    """Show nothing."""
