"""Goals that are not ratios of two contestants."""

from dataclasses import dataclass, field


@dataclass
class Checks:
    """One line for each measured value, and the lines that missed their goal."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, line: str, reached: bool) -> None:
        """Add a line, marked where its goal was missed."""
        self.lines.append(f"- {line}{'' if reached else ' **missed**'}")
        if not reached:
            self.missed.append(line)

    def format_section(self) -> str:
        """Format the section of the page."""
        return "\n".join(["## Start-up, growth, agreement\n", *self.lines, ""])
