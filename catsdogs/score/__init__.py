"""Bulk classification into Parquet; `pipeline.py` shows the stages."""

from catsdogs.score.api import score, verify

__all__ = ["score", "verify"]
