"""Text that is safe to show on a terminal and in a page, and short enough for a line.

Every message passes `shorten`: of an error of ours when it is raised, of a row when its result is built, of a line when
it is printed or logged.
"""

import unicodedata

# Persian words and emoji need joiners; every other character without a visible shape is escaped.
JOINERS = "\u200c\u200d"
SHAPELESS = {"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"}
MAX_MESSAGE_CHARS = 500
GAP = " ... "


def shorten(message: str) -> str:
    """Cut the middle out of a message that is too long: its start says what failed, its end what to do."""
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    num_kept = (MAX_MESSAGE_CHARS - len(GAP)) // 2
    return message[:num_kept] + GAP + message[-num_kept:]


def format_line(message: str) -> str:
    """Escape and shorten a message for a terminal or a log."""
    return shorten(escape_invisible(message))


def escape_invisible(text: str) -> str:
    """Escape characters that are invisible, reorder text, control a terminal or cannot be encoded as UTF-8."""
    return text if text.isascii() and text.isprintable() else "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if unicodedata.category(character) not in SHAPELESS or character in JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
