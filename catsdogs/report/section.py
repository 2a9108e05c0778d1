"""What a section of the page is, and the one way to fill a template.

Every string that a template shows passes `visible` and is then HTML-escaped, so file names and class
names are shown as text whatever they hold.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Joiners belong to Persian words and to emoji; everything else without a shape of its own is spelled out.
_JOINERS = "\u200c\u200d"
_SHAPELESS = {"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of the page; `html` is trusted, so build it with `render`."""

    title: str
    html: Markup


def visible(text: str) -> str:
    """Spell out characters that are invisible, reorder text, drive terminals or cannot be encoded."""
    return text if text.isascii() and text.isprintable() else "".join(map(_spelled, text))


def _spelled(character: str) -> str:
    if unicodedata.category(character) not in _SHAPELESS or character in _JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _finalize(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def count(value: float) -> str:
    """Write a whole number with thousands separators."""
    return f"{value:,.0f}"


def decimal(value: float | None, places: int = 3) -> str:
    """Write a number with fixed places, a dash where it is not a number."""
    return "–" if value is None or value != value else f"{value:.{places}f}"


def percent(share: float) -> str:
    """Write a share of one as a percentage that is 0 % or 100 % only when it is exactly that."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def base_name(path: str) -> str:
    """Return the last part of a path or URI."""
    return path.rstrip("/").rpartition("/")[2] or path


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"count": count, "decimal": decimal, "percent": percent, "base_name": base_name}


def render(template: str, **values: object) -> Markup:
    """Fill the template `NAME.html.j2` of this folder."""
    html = _ENVIRONMENT.get_template(f"{template}.html.j2").render(values)
    return Markup(re.sub(r"\n\s*\n+", "\n", html))
