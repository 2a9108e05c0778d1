"""Reports: one self-contained HTML page from numbers and images.

A page makes no requests, needs no JavaScript (that of `review` has one script), and follows the light and the dark
scheme. This package imports neither Ray nor torch and reads no storage.
"""

from catsdogs.report.comparison import (
    PairedHistogram,
    flips,
    largest_changes,
    paired_accuracy,
    paired_histograms,
    paired_shares,
    paired_sizes,
    status_changes,
)
from catsdogs.report.decision_sections import calibration, decision_counts
from catsdogs.report.findings import Finding, findings, issue_counts
from catsdogs.report.pictures import Picture, class_examples, dataset_grid, worst_mistakes
from catsdogs.report.review import ReviewPicture, review_page
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
    "Finding",
    "PairedHistogram",
    "Picture",
    "ReviewPicture",
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
    "findings",
    "flips",
    "issue_counts",
    "label_counts",
    "largest_changes",
    "page",
    "paired_accuracy",
    "paired_histograms",
    "paired_shares",
    "paired_sizes",
    "review_page",
    "settings",
    "status_changes",
    "worst_mistakes",
]
