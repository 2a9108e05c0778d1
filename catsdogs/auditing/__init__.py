"""Look at images before training: one read of each file, pairs of equal and of similar images, issues, a report."""

from catsdogs.auditing.pipeline import audit
from catsdogs.auditing.summary import describe

__all__ = ["audit", "describe"]
