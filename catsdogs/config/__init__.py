"""The settings of each command, one frozen dataclass each. The command line is derived from them.

checks.py     checks of settings, and the types and limits that several commands share
train.py      train
evaluate.py   evaluate
score.py      score, verify
audit.py      audit
demo.py       demo, download
"""

from catsdogs.config.audit import ISSUES, AuditConfig
from catsdogs.config.checks import DEFAULT_BATCH_SIZE, MAX_IMG_SIZE, MAX_SEED, MIN_IMG_SIZE, PrecisionChoice, UseGpu
from catsdogs.config.demo import DemoConfig, DownloadConfig
from catsdogs.config.evaluate import EvaluateConfig
from catsdogs.config.score import ScoreConfig, VerifyConfig
from catsdogs.config.train import TrainConfig

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "ISSUES",
    "MAX_IMG_SIZE",
    "MAX_SEED",
    "MIN_IMG_SIZE",
    "AuditConfig",
    "DemoConfig",
    "DownloadConfig",
    "EvaluateConfig",
    "PrecisionChoice",
    "ScoreConfig",
    "TrainConfig",
    "UseGpu",
    "VerifyConfig",
]
