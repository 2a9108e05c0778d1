"""Render templates and the page.

Every string in a template goes through `escape_invisible` and is then HTML-escaped, so that a page shows file names and
class names as text, whatever they contain.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from catsdogs.text import escape_invisible


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of the page. `html` is trusted: build it with `render`."""

    title: str
    html: Markup


def _finalize(value: object) -> object:
    return escape_invisible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def format_decimal(value: float | None, places: int = 3) -> str:
    """Format a number with fixed places; a dash for None and nan."""
    return "–" if value is None or value != value else f"{value:.{places}f}"


def format_percent(share: float) -> str:
    """Format a fraction as a percentage; only exactly 0 and 1 become 0 % and 100 %."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def _base_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "count": "{:,.0f}".format,
    "decimal": format_decimal,
    "percent": format_percent,
    "base_name": _base_name,
}


def render(template: str, **values: object) -> Markup:
    """Render the template `NAME.html.j2` of this folder."""
    html = _ENVIRONMENT.get_template(f"{template}.html.j2").render(values)
    return Markup(re.sub(r"\n\s*\n+", "\n", html))


def page(title: str, sections: Sequence[Section], *, subtitle: str = "", script_hash: str | None = None) -> str:
    """Render a self-contained page, which can be encoded as UTF-8 whatever names it shows.

    Args:
        script_hash: of the one script that may run, such as `sha256-...`.
    """
    return str(render("page", title=title, subtitle=subtitle, sections=sections, script_hash=script_hash))
