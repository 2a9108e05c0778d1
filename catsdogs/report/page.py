"""Sections -> the whole HTML page."""

from collections.abc import Sequence

from catsdogs.report.section import Section, render


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Return a self-contained page; it can be encoded as UTF-8 whatever names it shows."""
    return str(render("page", title=title, subtitle=subtitle, sections=sections))
