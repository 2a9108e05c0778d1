"""Reports: one self-contained HTML page from numbers and images.

The page makes no requests, needs no JavaScript, and follows the light and the dark scheme. This package imports
neither Ray nor torch and reads no storage.
"""

from catsdogs.report.decision_sections import calibration, decision_counts
from catsdogs.report.pictures import Picture, class_examples, dataset_grid, worst_mistakes
from catsdogs.report.sections import (
    confidence,
    confusion_matrix,
    curves,
    facts,
    failures,
    label_counts,
    settings,
)
from catsdogs.report.templates import Section, page

__all__ = [
    "Picture",
    "Section",
    "calibration",
    "class_examples",
    "confidence",
    "confusion_matrix",
    "curves",
    "dataset_grid",
    "decision_counts",
    "facts",
    "failures",
    "label_counts",
    "page",
    "settings",
    "worst_mistakes",
]
