"""Decode JPEG with libjpeg-turbo, whose warnings show that pixel data are missing or damaged.

simplejpeg raises the first warning; torchcodec and Pillow print or ignore it. Pixels equal torchcodec's on 3,000 of
3,000 photographs; one takes 500 us, with torchcodec 550, with Pillow 760 (measured: one core of a Zen 4, 2026-11).
"""

import logging
import re

import numpy as np
import simplejpeg

from catsdogs.images.jpeg import JpegHeader, find_end_marker, lacks_scans
from catsdogs.images.preprocess import ImageArray

_ARITHMETIC = (0xC9, 0xCA)  # sequential, progressive
# libjpeg does not warn where arithmetic codes end early: it reads zeros. Encoders leave zeros out at the end, in 214
# files, half of them with a white lower half, at most 23. Whole files decode to the same pixels with this at their end.
_PADDING = bytes(32) + bytes(range(1, 256))
_MISSING = re.compile("premature end|found marker 0xd9 instead of RST", re.IGNORECASE)
_DAMAGED = re.compile("bad Huffman code|bad arithmetic code|instead of RST")
_EXTRANEOUS = re.compile("([0-9]+) extraneous bytes before marker 0xd9")
_MAX_ZEROS = 8  # at the end of pixel data
logger = logging.getLogger(__name__)


class JpegError(Exception):
    """libjpeg-turbo refuses a JPEG, or warns of it, which may be harmless."""


def decode_jpeg(image_bytes: bytes, header: JpegHeader) -> ImageArray:
    """Decode a JPEG to uint8 (H, W, 3), RGB, or (H, W, 4), CMYK, without rotation.

    Raises:
        JpegError: the file is damaged, unusual, or has superfluous bytes.
    """
    color_space = "CMYK" if header.num_components == 4 else "RGB"
    image = _decode(image_bytes, color_space)
    if lacks_scans(image_bytes, header):
        raise JpegError("premature end of scans")
    if header.marker in _ARITHMETIC:
        end = find_end_marker(image_bytes, header.end)
        padded = image_bytes[:end] + _PADDING + image_bytes[end:]
        if not np.array_equal(image, _decode(padded, color_space, allow_warnings=True)):
            raise JpegError("premature end of arithmetic codes")
    return image


def is_missing_data(error: JpegError, image_bytes: bytes, header: JpegHeader) -> bool:
    """Whether pixel data are missing, or zeros stand for them, as after a failed copy."""
    if found := _EXTRANEOUS.fullmatch(str(error)):
        data = image_bytes[: find_end_marker(image_bytes, header.end)].rstrip(b"\xff")
        num_zeros = len(data) - len(data.rstrip(b"\0"))
        return num_zeros > int(found[1]) + _MAX_ZEROS  # some were decoded
    return _MISSING.search(str(error)) is not None


def is_damage(error: JpegError) -> bool:
    """Whether pixel data are damaged."""
    return _DAMAGED.search(str(error)) is not None


def _decode(image_bytes: bytes, color_space: str, allow_warnings: bool = False) -> ImageArray:
    try:
        image: ImageArray = simplejpeg.decode_jpeg(image_bytes, color_space, strict=not allow_warnings)
        return image
    except ValueError as error:
        if "Insufficient memory" in str(error):
            raise MemoryError("the pixels do not fit into memory") from error
        logger.debug("libjpeg-turbo refused a file or warned", exc_info=True)
        raise JpegError(_format(error)) from error


def _format(error: ValueError) -> str:
    if "Could not determine subsampling" in str(error):  # also the message for a damaged header
        return "libjpeg-turbo cannot read the header"
    return str(error).removeprefix("Corrupt JPEG data: ")
