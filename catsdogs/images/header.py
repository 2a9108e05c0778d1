"""Read what the header of an image file says besides its size: mode, orientation and number of frames."""

from typing import NamedTuple

from catsdogs.images.formats import sniff
from catsdogs.images.jpeg import read_jpeg_header
from catsdogs.images.pillow import PillowError, count_frames, open_image, read_exif_orientation
from catsdogs.images.tiff import read_orientation

MODES_OF_JPEG = {1: "L", 3: "RGB", 4: "CMYK"}


class ImageHeader(NamedTuple):
    """Properties of a file, None where they are unknown.

    Attributes:
        mode: Pillow's mode of the stored pixels, such as RGB, L, P or CMYK.
        orientation: of EXIF, 1 to 8.
        frames: of an animation, or pages of a TIFF.
    """

    mode: str | None = None
    orientation: int | None = None
    frames: int | None = None


def read_header(image_bytes: bytes) -> ImageHeader:
    """Read the header of a file that `decode_image` decodes."""
    file_format = sniff(image_bytes)
    if file_format == "JPEG":
        header = read_jpeg_header(image_bytes)
        if header is None:
            return ImageHeader()
        orientation = read_orientation(header.exif) if header.exif else None
        return ImageHeader(MODES_OF_JPEG.get(header.num_components), _check_orientation(orientation), 1)
    if file_format in (None, "HEIC"):
        return ImageHeader("RGB" if file_format else None)
    try:
        image = open_image(file_format, image_bytes)
        orientation = read_orientation(image_bytes) if file_format == "TIFF" else read_exif_orientation(image)
        return ImageHeader(image.mode, _check_orientation(orientation), count_frames(image))
    except PillowError:  # of more than 8 bits, for example
        return ImageHeader()


def _check_orientation(orientation: int | None) -> int | None:
    return orientation if orientation in range(1, 9) else None
