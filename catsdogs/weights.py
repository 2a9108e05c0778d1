"""Load the initial weights of a training run."""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from catsdogs import storage
from catsdogs.checkpoint import CONFIG, HEAD, WEIGHTS, check_shapes, parse_safetensors, read_config
from catsdogs.errors import InputError
from catsdogs.resnet import ResNet50

# torchvision's ResNet50_Weights.IMAGENET1K_V2; the download is checked against the digits of the sha256 in its name.
IMAGENET_URL = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"

StateDict = dict[str, torch.Tensor]


def load_pretrained(model: ResNet50, weights: str, class_names: tuple[str, ...]) -> str:
    """Load the initial weights, the head only if it has the same classes; return a message for the user.

    Args:
        weights: `imagenet`, `none`, a path or URI of a .pth or .safetensors file, or a checkpoint directory.

    Raises:
        InputError: the weights cannot be read or do not fit.
    """
    if weights == "none":
        return "random weights"
    state, head_names = _read_weights(weights)
    own_head = {f"{HEAD}.{name}": tensor for name, tensor in model.fc.state_dict().items()}
    head = {name: tensor for name, tensor in state.items() if name.startswith(f"{HEAD}.")}
    fits = all(name in own_head and own_head[name].shape == tensor.shape for name, tensor in head.items())
    if head and fits and head_names in (None, class_names) and weights != "imagenet":
        load_state_dict_strictly(model, state, weights)
        return f"weights and head from {weights}"
    load_state_dict_strictly(model, state | own_head, weights)
    replaced = f"{len(head[f'{HEAD}.bias'])} classes" if f"{HEAD}.bias" in head else "none"
    return f"weights from {weights}; a new head for {len(class_names)} classes replaces its own ({replaced})"


def load_state_dict_strictly(model: ResNet50, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict with exactly the model's keys and shapes; raises as `check_shapes`."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(own, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    model.load_state_dict(state, strict=False)


def _read_weights(weights: str) -> tuple[StateDict, tuple[str, ...] | None]:
    """Read a state dict, and the class names of its head if known."""
    if weights == "imagenet":
        return _download_imagenet(), None
    uri = storage.absolute(weights)
    if uri.endswith(".safetensors"):
        return parse_safetensors(storage.read_bytes(uri), uri), None
    if uri.endswith((".pth", ".pt")):
        return parse_torch_file(storage.read_bytes(uri), uri), None
    if not storage.exists(storage.join(uri, CONFIG)):
        raise InputError(
            f"--weights {weights}: expected imagenet, none, a .pth or .safetensors file, or a checkpoint "
            f"directory with {CONFIG}; found none of these"
        )
    class_names, _ = read_config(uri)
    return parse_safetensors(storage.read_bytes(storage.join(uri, WEIGHTS)), uri), class_names


def _download_imagenet() -> StateDict:
    try:
        return torch.hub.load_state_dict_from_url(IMAGENET_URL, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"cannot download the ImageNet weights from {IMAGENET_URL}: {error}; "
            "download them elsewhere and give --weights FILE, or start from --weights none"
        ) from error


def parse_torch_file(content: bytes, source: str) -> StateDict:
    """Parse a state dict from torch.save to fp32; raises InputError with `source`.

    It may be in a dict under `state_dict` or `model`, and its keys may start with DDP's `module.`.
    """
    try:
        loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of any type
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source} is not a state dict that loads with weights_only=True: {first_line}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
        raise InputError(f"{source}: expected a state dict of tensors, got {type(loaded).__name__}")
    return {
        name.removeprefix("module."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in loaded.items()
    }
