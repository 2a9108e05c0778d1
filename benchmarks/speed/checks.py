"""What must hold beside the ratios."""

from dataclasses import dataclass, field


@dataclass
class Checks:
    """What was measured, and whether it is as asked."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def note(self, what: str, holds: bool) -> None:
        """Add a line; what does not hold is marked, and kept for the exit code."""
        self.lines.append(f"- {what}{'' if holds else ' **missed**'}")
        if not holds:
            self.missed.append(what)

    def section(self) -> str:
        """Lay it out for the page."""
        return "\n".join(["## Start-up, growth, agreement\n", *self.lines, ""])
