"""Outputs of `score` and `evaluate`, read file by file. No Ray.

files.py      find the Parquet files of a result, and read them
batches.py    their rows, some at a time, as compact arrays
"""

from catsdogs.results.batches import NONE, OK_CODE, Batch, Rows, hash_paths
from catsdogs.results.files import Result

__all__ = ["NONE", "OK_CODE", "Batch", "Result", "Rows", "hash_paths"]
