"""Parse the state dicts that torch.save writes: any program's, and only their tensors.

Nested dicts are unwrapped. What is no plain tensor is refused: it may run code, or need more memory than its file.
"""

import argparse
import io
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from catsdogs.errors import InputError
from catsdogs.text import format_names, format_reason

# Where programs nest the state dict of a model: torch's examples, timm, Lightning, DeepSpeed; EMA only without others.
NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "state_dict_ema", "model_ema")
MAX_NESTS = 3
ZIP_MAGIC = b"PK\x03\x04"
SAVE_TENSORS = "save the tensors alone: torch.save(model.state_dict(), FILE)"


def parse_torch_file(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """Parse a state dict from torch.save, which may be nested in dicts (`NESTS`), to fp32.

    Raises:
        InputError: with `source`.
    """
    _check_archive(content, source)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in checkpoints of timm
            loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of any type
        raise InputError(
            f"{source} is not a state dict that loads with weights_only=True: {_explain(error)}"
        ) from error
    state_dict = _unwrap(loaded)
    # A subclass of dict may have attributes from the file in place of methods.
    items = list(dict.items(state_dict)) if isinstance(state_dict, dict) else []
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in items
    ):
        names = [name for name, _ in items if isinstance(name, str)]
        keys = f" with the keys {format_names(names)}" if names else ""
        raise InputError(
            f"{source}: expected a state dict of tensors, got {type(state_dict).__name__}{keys}; {SAVE_TENSORS}"
        )
    state_dict = dict(items)
    _check_tensors(state_dict, len(content), source)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}


def _check_archive(content: bytes, source: str) -> None:
    """Refuse a zip file that unpacks to more than its size, before torch does it; torch.save compresses nothing."""
    if not content.startswith(ZIP_MAGIC):  # the format before torch 1.6
        return
    try:
        entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except Exception as error:  # damaged bytes raise errors of any type
        raise InputError(f"{source}: expected a file of torch.save, got a damaged zip file: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > len(content)
    ):
        raise InputError(f"{source}: expected a file of torch.save, got a compressed zip file; {SAVE_TENSORS}")


def _check_tensors(state_dict: Mapping[str, torch.Tensor], num_bytes: int, source: str) -> None:
    """Refuse tensors that take more memory than the file, or that are no tensors of a ResNet50."""
    for name, tensor in state_dict.items():
        if vars(tensor):
            raise InputError(f"{source}: expected tensors without attributes, got {name} with some; {SAVE_TENSORS}")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.is_complex() or tensor.nbytes > tensor.untyped_storage().nbytes():
            described = f"{tensor.layout}, {tensor.dtype}, {tensor.device.type}, {tuple(tensor.shape)}"
            raise InputError(
                f"{source}: expected dense real tensors with an element in memory for each of their own, got {name}: "
                f"{described}; {SAVE_TENSORS}"
            )
    if sum(tensor.nbytes for tensor in state_dict.values()) > num_bytes:
        raise InputError(f"{source}: expected tensors of their own memory, got several names of one; {SAVE_TENSORS}")


def _unwrap(loaded: Any) -> Any:
    """Return the state dict that a checkpoint has under one of the `NESTS`, or what was loaded."""
    for _ in range(MAX_NESTS):
        inner = [dict.get(loaded, name) for name in NESTS] if isinstance(loaded, dict) else []
        loaded = next((value for value in inner if isinstance(value, dict)), loaded)
    return loaded


def _explain(error: Exception) -> str:
    """Explain why torch refused a file; it names the first object that is neither a tensor nor plain data."""
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return f"it has an object of {found[1]}, whose code could do anything; {SAVE_TENSORS}"
    return format_reason(error)
