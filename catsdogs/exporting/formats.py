"""Formats of a graph: write it to bytes, and run such bytes."""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from catsdogs.errors import InputError
from catsdogs.images import ImageArray
from catsdogs.predictions import FloatArray

logger = logging.getLogger(__name__)

OPSET = 20
MAX_BATCH, MAX_SIDE = 4096, 1 << 16
INPUT, OUTPUT = "images", "probabilities"
INSTALL = "pip install onnx onnxscript onnxruntime"


class Format(NamedTuple):
    """How a graph is written with its metadata, and run."""

    file_name: str
    serialize: Callable[[torch.export.ExportedProgram, Mapping[str, str]], bytes]
    run: Callable[[bytes, Sequence[ImageArray]], FloatArray]


def check_packages(name: str) -> None:
    """Check that the packages of a format are installed."""
    if name != "onnx":
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"--format onnx: expected the package {error.name}: {INSTALL}; or use --format torch"
        ) from error


def trace(model: torch.nn.Module, example: torch.Tensor, with_resize: bool) -> torch.export.ExportedProgram:
    """Trace a model for any number of images, and with resizing for any size."""
    names = ("N", "H", "W") if with_resize else ("N",)
    dims = {i: torch.export.Dim(name, min=1, max=MAX_SIDE if i else MAX_BATCH) for i, name in enumerate(names)}
    return torch.export.export(model, (example,), dynamic_shapes={INPUT: dims})


def _serialize_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    exported = torch.onnx.export(
        program, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, dynamo=True, verbose=False
    )
    assert exported is not None
    proto = exported.model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = proto.SerializeToString()
    return content


def _run_onnx(content: bytes, images: Sequence[ImageArray]) -> FloatArray:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([OUTPUT], {INPUT: image[None]})[0] for image in images])


def _serialize_torch(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return buffer.getvalue()


def _run_torch(content: bytes, images: Sequence[ImageArray]) -> FloatArray:
    module = torch.export.load(io.BytesIO(content)).module()
    with torch.inference_mode():
        return torch.cat([module(torch.from_numpy(image[None])) for image in images]).numpy()


FORMATS = {
    "onnx": Format("model.onnx", _serialize_onnx, _run_onnx),
    "torch": Format("model.pt2", _serialize_torch, _run_torch),
}
