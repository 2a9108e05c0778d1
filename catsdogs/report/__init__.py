"""Reports: one self-contained HTML page from numbers and images.

The page makes no requests, needs no JavaScript, and follows the light and the dark scheme. This package imports
neither Ray nor torch and reads no storage.
"""

from catsdogs.report.sections import (
    Picture,
    confidence,
    confusion_matrix,
    curves,
    dataset_grid,
    facts,
    failures,
    label_counts,
    settings,
    worst_mistakes,
)
from catsdogs.report.templates import Section, page

__all__ = [
    "Picture",
    "Section",
    "confidence",
    "confusion_matrix",
    "curves",
    "dataset_grid",
    "facts",
    "failures",
    "label_counts",
    "page",
    "settings",
    "worst_mistakes",
]
