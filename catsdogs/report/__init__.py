"""Numbers and pictures -> one self-contained HTML page.

    section.py    what a section is; templates; text made harmless
    plots.py      numbers -> inline SVG that follows the page's colours
    curves.py     loss and accuracy by epoch
    confusion.py  confusion matrix and per-class quality
    pictures.py   thumbnails: a look at the data, the worst mistakes
    tables.py     key figures, settings, labels, confidence, failures
    page.py       sections -> the page

The page asks the network for nothing, needs no JavaScript and works in light and dark. Knows neither
Ray nor torch, reads no storage.
"""

from catsdogs.report.confusion import confusion_matrix
from catsdogs.report.curves import curves
from catsdogs.report.page import page
from catsdogs.report.pictures import Picture, dataset_grid, worst_mistakes
from catsdogs.report.section import Section
from catsdogs.report.tables import confidence, facts, failures, label_counts, settings

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
