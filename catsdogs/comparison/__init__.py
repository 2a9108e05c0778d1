"""What changed between two tables of predictions; `pipeline.py` shows the stages. No Ray.

api.py        compare(), which imports the rest
pipeline.py   compare(): reads both results, writes compare.json, changes.parquet and report.html
pairs.py      images that are in both results: flips, changes of status, differences, accuracy
drift.py      differences between two sets of images: population stability index, embeddings
page.py       the sections of report.html
"""

from catsdogs.comparison.api import compare

__all__ = ["compare"]
