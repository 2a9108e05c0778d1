"""The settings of `export`."""

from dataclasses import dataclass
from typing import Literal

from catsdogs.config.checks import check_choices


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint as ONNX or torch.export, with normalization and softmax inside, checked on images."""

    checkpoint: str
    """Checkpoint folder, such as runs/NAME/best."""
    output: str
    """Folder or s3:// prefix for the graph, the reference images and export.json."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx is model.onnx; torch is model.pt2, of torch.export."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the backbone."""
    with_resize: bool = False
    """The graph takes images of any size, and resizes and crops them exactly as score does."""

    def __post_init__(self) -> None:
        check_choices(self)
