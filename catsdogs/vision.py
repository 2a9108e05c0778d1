"""torchvision's names, without torch's compiler; nothing else of the package imports torchvision.

torchvision uses `torch._dynamo` for two things of no use here: an operator that ResNet50 does not have
(`ops/roi_align.py`) and a mark on a setting of tensor subclasses (`tv_tensors/__init__.py`). Importing it takes half of
the start of every process: 5.4 of 11 s (2-core Zen 4, torchvision 0.29, 2026-11).
"""

import sys
import types


def import_torchvision() -> None:
    """Import what this package uses of torchvision with a stand-in for the compiler, which comes later if asked for."""
    import torch

    if "torchvision" in sys.modules or "torch._dynamo" in sys.modules:
        return
    compiler, questions = types.ModuleType("torch._dynamo"), types.ModuleType("torch._dynamo.utils")
    vars(compiler)["disable"] = lambda function=None, *_, **__: function
    vars(questions)["is_compile_supported"] = lambda _: False
    sys.modules.update({compiler.__name__: compiler, questions.__name__: questions})
    vars(torch)["_dynamo"] = compiler
    try:
        import torchvision.io  # registers torch.ops.image
        import torchvision.models
        import torchvision.transforms.v2  # noqa: F401
    finally:
        del sys.modules[compiler.__name__], sys.modules[questions.__name__], vars(torch)["_dynamo"]


import_torchvision()

from torchvision.models import ResNet, ResNet50_Weights, resnet50  # noqa: E402
from torchvision.models.resnet import Bottleneck  # noqa: E402
from torchvision.transforms.v2 import InterpolationMode, functional  # noqa: E402

__all__ = ["Bottleneck", "InterpolationMode", "ResNet", "ResNet50_Weights", "functional", "resnet50"]
