"""The settings of each command, one frozen dataclass each. The command line is derived from them.

checks.py     checks of settings, and the types and limits that several commands share
train.py      train
evaluate.py   evaluate
score.py      score, verify
export.py     export
audit.py      audit
compare.py    compare
review.py     review
demo.py       demo, download
"""

from catsdogs.config.audit import ISSUES, SUSPECT_LABEL, AuditConfig
from catsdogs.config.checks import DEFAULT_BATCH_SIZE, MAX_IMG_SIZE, MAX_SEED, MIN_IMG_SIZE, PrecisionChoice, UseGpu
from catsdogs.config.compare import (
    DRIFT_FIGURES,
    FIGURES,
    LABEL_FIGURES,
    PAIR_FIGURES,
    CompareConfig,
    Condition,
)
from catsdogs.config.demo import DemoConfig, DownloadConfig
from catsdogs.config.evaluate import EvaluateConfig
from catsdogs.config.export import ExportConfig
from catsdogs.config.review import MAX_REVIEWED, ReviewConfig
from catsdogs.config.score import ScoreConfig, VerifyConfig
from catsdogs.config.train import TrainConfig

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DRIFT_FIGURES",
    "FIGURES",
    "ISSUES",
    "LABEL_FIGURES",
    "MAX_IMG_SIZE",
    "MAX_REVIEWED",
    "MAX_SEED",
    "MIN_IMG_SIZE",
    "PAIR_FIGURES",
    "SUSPECT_LABEL",
    "AuditConfig",
    "CompareConfig",
    "Condition",
    "DemoConfig",
    "DownloadConfig",
    "EvaluateConfig",
    "ExportConfig",
    "PrecisionChoice",
    "ReviewConfig",
    "ScoreConfig",
    "TrainConfig",
    "UseGpu",
    "VerifyConfig",
]
