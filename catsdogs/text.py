"""Text that is safe to show on a terminal and in a page."""

import unicodedata

# Persian words and emoji need joiners; every other character without a visible shape is escaped.
JOINERS = "\u200c\u200d"
SHAPELESS = {"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"}


def escape_invisible(text: str) -> str:
    """Escape characters that are invisible, reorder text, control a terminal or cannot be encoded as UTF-8."""
    return text if text.isascii() and text.isprintable() else "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if unicodedata.category(character) not in SHAPELESS or character in JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
