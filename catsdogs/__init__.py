"""Fine-tune ResNet50 on labelled images with Ray Train; bulk-classify images into Parquet with Ray Data.

The functions have the names of the commands. They import Ray and torch when they are called. Some have the name of a
package, too: `catsdogs.train` is the function, and `from catsdogs.train.loop import ...` imports from the package.

Example:
    >>> import catsdogs
    >>> run = catsdogs.train(catsdogs.TrainConfig(data_dir="data/cats_and_dogs_filtered"))
    >>> catsdogs.score(catsdogs.ScoreConfig(input="photos", checkpoint=f"{run.uri}/best", output="runs/scores"))
"""

from catsdogs.auditing.api import audit
from catsdogs.comparison.api import compare
from catsdogs.config import (
    AuditConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    ReviewConfig,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
)
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.evaluate.api import evaluate
from catsdogs.exporting.api import export
from catsdogs.image_api import augment_image, read_images
from catsdogs.reviewing.api import review
from catsdogs.score.api import score, verify
from catsdogs.train.api import train

__version__ = "0.1.0"
__all__ = [
    "AuditConfig",
    "CatsdogsError",
    "CompareConfig",
    "EvaluateConfig",
    "ExportConfig",
    "InputError",
    "ReviewConfig",
    "RunError",
    "ScoreConfig",
    "TrainConfig",
    "VerifyConfig",
    "audit",
    "augment_image",
    "compare",
    "evaluate",
    "export",
    "read_images",
    "review",
    "score",
    "train",
    "verify",
]
