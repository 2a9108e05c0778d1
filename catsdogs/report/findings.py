"""The sections of an audit: counts of issues, and pictures of what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from catsdogs.report.pictures import Picture
from catsdogs.report.sections import rank
from catsdogs.report.templates import Section, render


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One odd image, or the two images of a pair, and what was found."""

    pictures: Sequence[Picture]
    note: str


def issue_counts(by_issue: Mapping[str, int], notes: Sequence[tuple[str, str]]) -> Section:
    """Build the section with the number of images with each issue.

    Args:
        notes: a heading and a text, of what concerns more than one image.
    """
    counts = {name: count for name, count in by_issue.items() if count}
    rows = rank(counts, len(counts))["rows"] if counts else []
    return Section(title="Issues", html=render("counts", rows=rows, caption="Images by issue", notes=notes))


def findings(title: str, text: str, shown: Sequence[Finding]) -> Section:
    """Build a section with pictures, all of pairs or all of single images; `text` says how many there are in all."""
    return Section(title=title, html=render("findings", text=text, shown=shown))
