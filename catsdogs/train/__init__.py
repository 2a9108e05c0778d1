"""Fine-tune ResNet50 with Ray Train; `loop.py` has the call diagram."""

from catsdogs.train.api import TrainResult, train

__all__ = ["TrainResult", "train"]
