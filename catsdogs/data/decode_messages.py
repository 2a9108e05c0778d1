"""Requests to the decoding child and its results, as bytes.

The child may be under the control of a malicious image. So its results have a fixed layout without pickle, and whatever
the layout does not allow is an InvalidResultError.

A request is REQUEST, then FILE for each file, then their contents, through a socket. The reply is DONE, or BUG with a
traceback. Shared memory has a slot for each file, which is RESULT and a text, then the pixels of each file.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from catsdogs.images import Decoded, ImageArray
from catsdogs.schema import OK
from catsdogs.text import MAX_MESSAGE_CHARS, escape_invisible, shorten

REQUEST = struct.Struct("<IQdd")  # number of files; bytes of the pixels of each; reserve and share of DecodeBudget
FILE = struct.Struct("<qQ")  # row, number of bytes
RESULT = struct.Struct("<BiidI")  # status, width, height, seconds, bytes of text
DONE, BUG = b"d", b"b"
NOT_KEPT = "not kept"  # instead of a status, in `full_size`
STATUSES_OF_CHILD = (None, OK, "empty", "unsupported", "truncated", "decode_error", "too_large", NOT_KEPT)
NO_SIZE = -1
MAX_ERROR_BYTES = 4 * MAX_MESSAGE_CHARS  # a character has at most 4 bytes in UTF-8
SLOT_BYTES = RESULT.size + MAX_ERROR_BYTES
MAX_SECONDS = 1e6  # more than any limit
MAX_TRACEBACK_BYTES = 1 << 16


class InvalidResultError(Exception):
    """The child sent bytes that are no result."""


class DecoderBugError(Exception):
    """The decoder raised. Bad files must return a status, so this is a bug; the message has the child's traceback."""


class Decoder(Protocol):
    """Decodes files in the child; compared by value, because a child serves one decoder."""

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        """Decode a file to an image of the size of the request's array; `row` seeds augmentation."""


class DecodeRequest(NamedTuple):
    """A file to decode, its row, and the array for its pixels: uint8 (V*S, S, 3), V views of S pixels a side."""

    image_bytes: bytes
    row: int
    pixels: ImageArray


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """The status of a file, its size and its decoding time; the pixels are in the request's array."""

    status: str
    error: str | None
    width: int | None
    height: int | None
    decode_s: float

    def __post_init__(self) -> None:
        if self.error is not None:
            object.__setattr__(self, "error", shorten(self.error))


def count_shared_bytes(num_files: int, pixel_bytes: int) -> int:
    """Return the size of the shared memory of a request."""
    return num_files * (SLOT_BYTES + pixel_bytes)


def view_shared(shared: ImageArray, num_files: int, pixel_bytes: int) -> tuple[ImageArray, ImageArray]:
    """View the slots, uint8 (N, SLOT_BYTES), and the pixels, uint8 (N, pixel_bytes), of N files."""
    slots, pixels = np.split(shared[: count_shared_bytes(num_files, pixel_bytes)], [num_files * SLOT_BYTES])
    return slots.reshape(num_files, SLOT_BYTES), pixels.reshape(num_files, pixel_bytes)


def write_result(slot: ImageArray, result: DecodeResult) -> None:
    """Write the result of a file into its slot."""
    text = (result.error or "").encode(errors="backslashreplace")[:MAX_ERROR_BYTES]
    size = (NO_SIZE, NO_SIZE) if result.width is None or result.height is None else (result.width, result.height)
    content = RESULT.pack(STATUSES_OF_CHILD.index(result.status), *size, result.decode_s, len(text)) + text
    slot[: len(content)] = np.frombuffer(content, np.uint8)


def count_results(slots: ImageArray) -> int:
    """Count the slots that have a result; the others start with 0."""
    return int(np.count_nonzero(slots[:, 0]))


def read_result(slot: ImageArray) -> DecodeResult | None:
    """Read the result of a file, None if there is none; raises InvalidResultError if a field is not valid."""
    content = slot.tobytes()  # a copy: the child may still write
    number, width, height, decode_s, num_text_bytes = RESULT.unpack_from(content)
    if number == 0:
        return None
    status = STATUSES_OF_CHILD[number] if number < len(STATUSES_OF_CHILD) else None
    has_size = (width, height) != (NO_SIZE, NO_SIZE)
    is_valid = (
        status is not None
        and (min(width, height) >= (1 if status == OK else 0) if has_size else status != OK)
        and 0 <= decode_s < MAX_SECONDS
        and num_text_bytes <= (0 if status == OK else MAX_ERROR_BYTES)
    )
    if not is_valid or status is None:
        raise InvalidResultError(f"not a result: {content[: RESULT.size]!r}")
    error = _decode_text(content[RESULT.size :][:num_text_bytes])
    return DecodeResult(status, error, width if has_size else None, height if has_size else None, decode_s)


def _decode_text(text: bytes) -> str | None:
    try:
        return text.decode() or None
    except UnicodeDecodeError as error:
        raise InvalidResultError("the text of a result is not UTF-8") from error


def pack_traceback(text: str) -> bytes:
    """Serialize the traceback of an exception of the decoder; of a long one its end."""
    return BUG + text.encode(errors="backslashreplace")[-MAX_TRACEBACK_BYTES:]


def unpack_traceback(content: bytes) -> DecoderBugError:
    """Build the error of a traceback without BUG; control characters are escaped."""
    lines = content.decode(errors="backslashreplace").split("\n")
    return DecoderBugError("the decoder raised an exception:\n" + "\n".join(map(escape_invisible, lines)))
