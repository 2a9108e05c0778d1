"""Classification of labelled images, and its metrics."""

from catsdogs.evaluate.api import evaluate

__all__ = ["evaluate"]
