"""Thumbnails of images: a look at the data, and the worst mistakes. H height, W width."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catsdogs.report.section import Section, render

_THUMBNAIL = 160  # pixels of the longer side: about as large as the grid shows it


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image with what is known of it.

    Args:
        image: uint8 (H, W, 3), RGB, of any size.
        prob: Probability of `label`, in [0, 1].
    """

    path: str
    image: NDArray[np.uint8]
    true_label: str | None = None
    label: str | None = None
    prob: float | None = None

    @property
    def thumbnail(self) -> str:
        """The image as a small JPEG in a `data:` URI."""
        image = Image.fromarray(np.ascontiguousarray(self.image))
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=82, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def dataset_grid(pictures: Sequence[Picture]) -> Section:
    """Show images with their labels."""
    return Section(title="Data", html=render("pictures", pictures=pictures, mistakes=False))


def worst_mistakes(pictures: Sequence[Picture]) -> Section:
    """Show wrongly labelled images, the most confident mistake first."""
    ordered = sorted(pictures, key=lambda picture: -1 if picture.prob is None else picture.prob, reverse=True)
    return Section(title="Worst mistakes", html=render("pictures", pictures=ordered, mistakes=True))
