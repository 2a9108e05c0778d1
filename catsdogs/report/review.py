"""The page on which a person labels images by keys. Its one script is allowed by its hash.

The script gets paths and class names as JSON, and shows them as text.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from catsdogs.report.pictures import encode_thumbnail
from catsdogs.report.templates import Section, page, render
from catsdogs.text import escape_invisible

_SIDE = 256  # pixels of the longer side of a picture
# Without empty lines, as `render` leaves it: the hash is that of each byte.
_SCRIPT = re.sub(r"\n\s*\n+", "\n", (Path(__file__).parent / "review.js").read_text())


@dataclass(frozen=True, kw_only=True, eq=False)
class ReviewPicture:
    """An image to label.

    Args:
        label: the predicted class.
        prob: its probability.
        image: uint8 (H, W, 3), RGB; None if it cannot be decoded now.
    """

    path: str
    label: str
    prob: float
    image: NDArray[np.uint8] | None


def review_page(class_names: Sequence[str], pictures: Sequence[ReviewPicture], digest: str) -> str:
    """Build the page.

    Args:
        digest: of what is reviewed; the browser keeps the labels under it.
    """
    images = [
        {
            "path": picture.path,
            "shown": escape_invisible(picture.path),
            "predicted": escape_invisible(picture.label),
            "prob": round(picture.prob, 4),
            "src": None if picture.image is None else encode_thumbnail(picture.image, _SIDE),
        }
        for picture in pictures
    ]
    classes = [{"name": name, "shown": escape_invisible(name)} for name in class_names]
    content = _escape_json({"digest": digest, "classes": classes, "images": images})
    html = render("review", content=content, script=Markup(_SCRIPT), num_classes=len(class_names), total=len(images))
    script_hash = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return page("Review", [Section(title="Label", html=html)], script_hash=f"sha256-{script_hash}")


def _escape_json(value: object) -> Markup:
    """Format JSON that can stand in a script element: it has no `<`, so no tag ends or begins in it."""
    text = json.dumps(value)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
