"""Text that is safe to show on a terminal and in a page, and short enough for a line.

Every message passes `shorten`: of an error of ours when it is raised, of a row when its result is built, of a line when
it is printed or logged.
"""

import re
import unicodedata
from collections.abc import Sequence

# Persian words and emoji need joiners; every other character without a visible shape is escaped.
JOINERS = "\u200c\u200d"
SHAPELESS = {"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"}
MAX_MESSAGE_CHARS = 500
GAP = " ... "
MAX_NAMES, MAX_NAMES_LENGTH = 10, 80  # of a list of names in a message
MAX_REASON_LENGTH = 200
# A URL may have secrets in its user and its query; it ends at white space, since quotes and brackets may be part of it.
# An S3 key may contain a question mark.
USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#@]{1,1000}@")
QUERY = re.compile(r"\b((?!s3:)[A-Za-z][A-Za-z0-9+.-]*://[^\s?]{0,4000}\?)\S*[^\s'\"<>:;,.)]")


def shorten(message: str) -> str:
    """Cut the middle out of a message that is too long: its start says what failed, its end what to do."""
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    num_kept = (MAX_MESSAGE_CHARS - len(GAP)) // 2
    return message[:num_kept] + GAP + message[-num_kept:]


def redact_queries(text: str) -> str:
    """Replace the user and the query of each URL in a text by dots."""
    return QUERY.sub(r"\1...", USER.sub(r"\1...@", text)) if "://" in text else text


def format_line(message: str) -> str:
    """Escape and shorten a message for a terminal or a log, without the queries of URLs."""
    return shorten(escape_invisible(redact_queries(message)))


def escape_invisible(text: str) -> str:
    """Escape characters that are invisible, reorder text, control a terminal or cannot be encoded as UTF-8."""
    return text if text.isascii() and text.isprintable() else "".join(map(_escape_character, text))


def format_names(names: Sequence[str], with_escapes: bool = False) -> str:
    """Quote the first names of a list and count the others, for a message.

    Args:
        with_escapes: also spell other letters than ASCII as escapes, because two names may look alike.
    """
    quoted = [
        f"{name!r} ({name!a})" if with_escapes and repr(name) != ascii(name) else repr(name)
        for name in names[:MAX_NAMES]
    ]
    while len(quoted) > 1 and len(", ".join(quoted)) > MAX_NAMES_LENGTH:
        quoted.pop()
    text = ", ".join(quoted) or "none"
    shown = text if len(text) <= MAX_NAMES_LENGTH else f"{text[: MAX_NAMES_LENGTH - 3]}..."
    return shown if len(quoted) == len(names) else f"{shown} and {len(names) - len(quoted)} more"


def format_reason(error: BaseException) -> str:
    """Return the text of an error of another package in one line of limited length; without a text, its class."""
    return " ".join(str(error).split())[:MAX_REASON_LENGTH] or type(error).__name__


def _escape_character(character: str) -> str:
    if unicodedata.category(character) not in SHAPELESS or character in JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
