"""The sections with images. H height, W width."""

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catsdogs.report.templates import Section, render

_THUMBNAIL = 160  # pixels of the longer side, about the size in the grid
MAX_EXAMPLE_BYTES = 3_000_000
MIN_OPACITY, PAPER = 0.15, 240  # of an image where it does not support the label; the gray behind it


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image with its labels.

    Args:
        image: uint8 (H, W, 3), RGB, of any size.
        prob: probability of `label`, in [0, 1].
        activation_map: float32 (h, w), of the whole image: where the evidence for `label` is.
    """

    path: str
    image: NDArray[np.uint8]
    true_label: str | None = None
    label: str | None = None
    prob: float | None = None
    activation_map: NDArray[np.float32] | None = None

    @functools.cached_property
    def thumbnail(self) -> str:
        """The image as a small JPEG in a `data:` URI."""
        return encode_thumbnail(self.image)

    @functools.cached_property
    def attention(self) -> str:
        """The same, the paler the less a place supports `label`; "" without an activation map."""
        if self.activation_map is None:
            return ""
        support = np.maximum(self.activation_map, 0)
        small = Image.fromarray(support / max(float(support.max()), 1e-12))
        size = (self.image.shape[1], self.image.shape[0])
        support_HW1 = np.asarray(small.resize(size, Image.Resampling.BILINEAR))[:, :, None]
        opacity_HW1 = MIN_OPACITY + (1 - MIN_OPACITY) * support_HW1
        return encode_thumbnail((PAPER + opacity_HW1 * (self.image - float(PAPER))).astype(np.uint8))


def encode_thumbnail(image: NDArray[np.uint8], side: int = _THUMBNAIL) -> str:
    """Encode an image, at most `side` pixels wide and high, as JPEG in a `data:` URI."""
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def dataset_grid(pictures: Sequence[Picture]) -> Section:
    """Build the section with images and their labels."""
    return Section(title="Data", html=render("pictures", pictures=pictures, mistakes=False, num_unreadable=0))


def worst_mistakes(pictures: Sequence[Picture], num_unreadable: int = 0) -> Section:
    """Build the section with misclassified images, the most confident first; if known, with what supports the label.

    Args:
        num_unreadable: further ones, whose images cannot be decoded any more.
    """
    ordered = sorted(pictures, key=lambda picture: -1 if picture.prob is None else picture.prob, reverse=True)
    html = render("pictures", pictures=ordered, mistakes=True, num_unreadable=num_unreadable)
    return Section(title="Worst mistakes", html=html)


def class_examples(examples: Mapping[str, tuple[Sequence[Picture], Sequence[Picture]]]) -> Section:
    """Build the section with images that the model is sure and unsure of.

    Args:
        examples: by predicted class; classes are left out once all thumbnails have MAX_EXAMPLE_BYTES.
    """
    shown, num_bytes = {}, 0
    for label, rows in examples.items():
        num_bytes += sum(len(picture.thumbnail) for row in rows for picture in row)
        if num_bytes <= MAX_EXAMPLE_BYTES:
            shown[label] = rows
    return Section(title="Examples", html=render("examples", examples=shown))
