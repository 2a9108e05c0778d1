"""Look at images before training: one read of each file, pairs of equal and of similar images, issues, a report."""

from catsdogs.auditing.api import audit

__all__ = ["audit"]
