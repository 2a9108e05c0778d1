"""Bulk classification into Parquet; `pipeline.py` shows the stages."""

from catsdogs.score.audit import verify
from catsdogs.score.pipeline import score

__all__ = ["score", "verify"]
