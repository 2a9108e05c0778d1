"""Load the initial weights of a training run.

Weights come from many programs. Only the tensors count: nested dicts are unwrapped, prefixes of keys removed, and a
head that does not fit is replaced.
"""

import argparse
import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from catsdogs import storage
from catsdogs.checkpoint import (
    BATCH_COUNTER,
    HEAD,
    WEIGHTS,
    check_shapes,
    check_values,
    format_keys,
    list_shapes,
    parse_safetensors,
    read_label_names,
)
from catsdogs.errors import InputError
from catsdogs.labels import normalize_name
from catsdogs.resnet import ResNet50
from catsdogs.text import format_names, format_reason

# torchvision's ResNet50_Weights.IMAGENET1K_V2.
IMAGENET_URL = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
IMAGENET_SHA256 = "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # .tar: .pth.tar
FOLDER_FILES = (WEIGHTS, "pytorch_model.bin")  # of this program, timm and Hugging Face
# Where programs nest the state dict of a model: torch's examples, timm, Lightning, DeepSpeed; EMA only without others.
NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "state_dict_ema", "model_ema")
MAX_NESTS = 3
COMPILED = "_orig_mod."  # torch.compile puts it before the names of the module that it wraps
STEM = "conv1.weight"  # with its prefix, the key of the first convolution
BLOCK = re.compile(r"(^|\.)layer\d\.\d+\.$")
LAYERS = {name.partition(".")[0] for name in list_shapes(1)}
ZIP_MAGIC = b"PK\x03\x04"
SAVE_TENSORS = "save the tensors alone: torch.save(model.state_dict(), FILE)"

StateDict = dict[str, torch.Tensor]


def load_pretrained(model: ResNet50, weights: str, class_names: tuple[str, ...]) -> str:
    """Load the initial weights, the head only if it has the same classes; return a message for the user.

    Args:
        weights: `imagenet`, `none`, a path or URI of a file of torch.save or safetensors, or a checkpoint directory.

    Raises:
        InputError: the weights cannot be read or do not fit.
    """
    if weights == "none":
        return "random weights"
    state, head_names = _read_weights(weights)
    own_head = {f"{HEAD}.{name}": tensor for name, tensor in model.fc.state_dict().items()}
    head = {name: tensor for name, tensor in state.items() if name.startswith(f"{HEAD}.")}
    left_out = _list_other_layers(state)
    backbone = {name: tensor for name, tensor in state.items() if name not in head and name not in left_out}
    note = f"; left out: {format_keys(left_out)}" if left_out else ""
    fits = {name: tensor.shape for name, tensor in head.items()} == {n: tensor.shape for n, tensor in own_head.items()}
    same_classes = head_names is None or tuple(map(normalize_name, head_names)) == class_names
    if fits and same_classes and weights != "imagenet":
        load_state_dict_strictly(model, backbone | head, weights)
        return f"weights and head from {weights}{note}"
    load_state_dict_strictly(model, backbone | own_head, weights)
    replaced = f"{len(head[f'{HEAD}.bias'])} classes" if f"{HEAD}.bias" in head else "none"
    return f"weights from {weights}; a new head for {len(class_names)} classes replaces its own ({replaced}){note}"


def _list_other_layers(state: StateDict) -> set[str]:
    """List the tensors beside a whole ResNet50, such as another head; none if the ResNet50 is not whole."""
    required = {name for name in list_shapes(1) if not name.startswith(f"{HEAD}.") and not name.endswith(BATCH_COUNTER)}
    if not required <= state.keys():
        return set()
    return {name for name in state if name.partition(".")[0] not in LAYERS}


def load_state_dict_strictly(model: ResNet50, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict with exactly the model's keys and shapes; raises as `check_shapes` and `check_values`."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(own, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    check_values(state, source)
    model.load_state_dict(state, strict=False)


def _read_weights(weights: str) -> tuple[StateDict, tuple[str, ...] | None]:
    """Read a state dict, and the class names of its head if known."""
    if weights == "imagenet":
        return _read_imagenet(), None
    uri = storage.absolute(weights)
    if uri.lower().endswith((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
        return _read_file(uri), None
    for name in FOLDER_FILES:
        if storage.exists(storage.join(uri, name)):
            return _read_file(storage.join(uri, name)), read_label_names(uri)
    raise InputError(
        f"--weights {weights}: expected imagenet, none, a file ({SAFETENSORS_SUFFIX} {' '.join(TORCH_SUFFIXES)}) or a "
        f"checkpoint directory with {' or '.join(FOLDER_FILES)}; found none of these"
    )


def _read_file(uri: str) -> StateDict:
    content = storage.read_bytes(uri)
    if uri.lower().endswith(SAFETENSORS_SUFFIX):
        return _strip_prefix(parse_safetensors(content, uri), uri)
    return parse_torch_file(content, uri)


def _strip_prefix(state: StateDict, source: str) -> StateDict:
    """Remove the prefix of the names of a ResNet50's tensors; other tensors keep their names.

    Wrappers put a prefix before each name: `module.` (DataParallel, DDP), `_orig_mod.` (torch.compile), `model.`
    (Lightning), `backbone.` or `encoder.` (a model with another head).
    """
    state = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    stems = sorted({name.removesuffix(STEM) for name in state if name.endswith(STEM)})
    stems = [prefix for prefix in stems if not BLOCK.search(prefix)]
    whole = [prefix for prefix in stems if f"{prefix}layer1.0.{STEM}" in state]
    if len(whole) > 1:
        raise InputError(
            f"{source}: expected one ResNet50, found several, whose keys start with {format_names(whole)}, such as a "
            "teacher or a momentum encoder; save the tensors of one of them in a file"
        )
    prefix = next(iter(whole or stems), "") if len(whole or stems) == 1 else ""
    others = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return others | {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def _read_imagenet() -> StateDict:
    """Read torchvision's weights from torch's cache, after a download if they are not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", IMAGENET_URL.rpartition("/")[2])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), IMAGENET_SHA256, progress=False)
        content = path.read_bytes()
    except (OSError, RuntimeError) as error:  # a RuntimeError if the sha256 differs
        raise InputError(
            f"cannot download the ImageNet weights from {IMAGENET_URL} to {path}: {format_reason(error)}; "
            "download them elsewhere and give --weights FILE, or start from --weights none"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != IMAGENET_SHA256:  # the cache may have been changed
        raise InputError(
            f"{path}: expected the ImageNet weights, with the sha256 {IMAGENET_SHA256}, got {found}; remove this file"
        )
    return parse_torch_file(content, str(path))


def parse_torch_file(content: bytes, source: str) -> StateDict:
    """Parse a state dict from torch.save to fp32; raises InputError with `source`.

    It may be nested in dicts (`NESTS`), and its keys may have a prefix.
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
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
    return _strip_prefix(state, source)


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
