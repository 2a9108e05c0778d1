"""Models to checkpoints and back, and the weights that training starts from."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from catsdogs import saved, storage
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.model import HEAD, build
from catsdogs.saved import CONFIG, WEIGHTS, CheckpointFiles
from catsdogs.vision import ResNet, ResNet50_Weights

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model with what is needed to use it; `sha256` is of its weights file."""

    model: ResNet
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    sha256: str


def save(uri: str, model: ResNet, class_names: tuple[str, ...], preprocessing: Preprocessing) -> None:
    """Write a checkpoint directory; each file appears whole.

    Raises:
        RunError: it cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    storage.write_bytes(storage.join(uri, CONFIG), saved.config_bytes(class_names, preprocessing))
    storage.write_bytes(storage.join(uri, WEIGHTS), save_safetensors(state, metadata={"format": "pt"}))


def load(uri: str) -> Checkpoint:
    """Read a checkpoint directory.

    Raises:
        InputError: a file is missing, unreadable or does not fit ResNet50.
    """
    return unpack(saved.read(uri))


def unpack(found: CheckpointFiles) -> Checkpoint:
    """Make the model of a checkpoint.

    Raises:
        InputError: its weights do not fit ResNet50.
    """
    model = build(len(found.class_names), seed=0)
    load_state(model, _parse_safetensors(found.weights, found.uri), found.uri)
    return Checkpoint(model.eval(), found.class_names, found.preprocessing, found.sha256)


def load_state(model: ResNet, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into a model, to the last key.

    Raises:
        InputError: names the keys that are missing, unexpected or of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved.check_fits(own, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    model.load_state_dict(state, strict=False)


def load_pretrained(model: ResNet, weights: str, class_names: tuple[str, ...]) -> str:
    """Start a model from `imagenet`, `none`, a file or a checkpoint directory; say what became of the head.

    Raises:
        InputError: the weights cannot be had or do not fit.
    """
    if weights == "none":
        return "random weights"
    state, head_names = _read_weights(weights)
    own = model.state_dict()
    head = {name: tensor for name, tensor in state.items() if name.startswith(f"{HEAD}.")}
    fits = all(name in own and own[name].shape == tensor.shape for name, tensor in head.items())
    keep = bool(head) and fits and head_names in (None, class_names) and weights != "imagenet"
    if not keep:
        state |= {name: own[name] for name in own if name.startswith(f"{HEAD}.")}
    load_state(model, state, weights)
    if keep:
        return f"weights and head from {weights}"
    came = f"{len(head[f'{HEAD}.bias'])} classes" if f"{HEAD}.bias" in head else "none"
    return f"weights from {weights}; a new head for {len(class_names)} classes replaces its own ({came})"


def _read_weights(weights: str) -> tuple[StateDict, tuple[str, ...] | None]:
    if weights == "imagenet":
        return _imagenet(), None
    uri = storage.absolute(weights)
    if uri.endswith(".safetensors"):
        return _parse_safetensors(storage.read_bytes(uri), uri), None
    if uri.endswith((".pth", ".pt")):
        return _parse_torch(storage.read_bytes(uri), uri), None
    if not storage.exists(storage.join(uri, CONFIG)):
        raise InputError(
            f"--weights {weights}: expected imagenet, none, a .pth or .safetensors file, or a checkpoint "
            f"directory with {CONFIG}; found none of these"
        )
    class_names, _ = saved.read_config(uri)
    return _parse_safetensors(storage.read_bytes(storage.join(uri, WEIGHTS)), uri), class_names


def _imagenet() -> StateDict:
    weights = ResNet50_Weights.IMAGENET1K_V2
    try:
        return cast(StateDict, dict(weights.get_state_dict(progress=False, check_hash=True)))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot download the ImageNet weights from {weights.url}: {error}; "
            "fetch them elsewhere and give --weights FILE, or start from --weights none"
        ) from error


def _parse_safetensors(content: bytes, source: str) -> StateDict:
    try:
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_safetensors(content).items()
        }
    except (SafetensorError, KeyError) as error:  # a KeyError: a type of numbers that it cannot load
        raise InputError(f"{source} is not a safetensors file: {error}") from error


def _parse_torch(content: bytes, source: str) -> StateDict:
    try:
        loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source} is not a state dict that loads with weights_only=True: {first_line}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(_is_weight(*item) for item in loaded.items()):
        raise InputError(f"{source}: expected a state dict of tensors, got {type(loaded).__name__}")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in loaded.items()
    }


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)
