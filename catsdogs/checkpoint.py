"""Checkpoint directories in timm's local-dir layout: `config.json` beside `model.safetensors`.

torch is imported only where tensors are parsed or written, since a driver sends checkpoints to workers without it.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize

from catsdogs import __version__, storage
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CALIBRATION = "calibration"  # key of the config
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")  # safetensors' names
MAX_NAMED_KEYS, MAX_KEYS_LENGTH = 5, 70  # of a list of keys in a message
HEAD = "fc"
NUM_FEATURES = 2048  # inputs of the head
BATCH_COUNTER = "num_batches_tracked"  # of a BatchNorm
Shape = tuple[int, ...]
# Parts of keys that are in no ResNet50, and what has them.
FOREIGN_KEYS = {
    "embedder.": "a ResNet of transformers, which has other names; timm has the same weights under torchvision's",
    "conv1.0.": "a ResNet-C or -D with a deep stem",
    ".se.": "an SE-ResNet",
    "layer3.6.": "a ResNet101 or 152",
    "stages.": "a ResNetV2, RegNet or ConvNeXt",
    "features.": "a VGG, DenseNet, MobileNet or EfficientNet of torchvision",
    "blocks.": "a ViT or EfficientNet of timm",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFiles:
    """The content of a checkpoint directory; `weights` and `sha256` belong to `model.safetensors`.

    Attributes:
        calibration: as `config.json` has it, not checked; None if it has none.
    """

    uri: str
    weights: bytes
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    sha256: str
    calibration: object = None

    def load_state_dict(self) -> "dict[str, torch.Tensor]":
        """Parse the weights: fp32 tensors under torchvision's key names; raises as `check_values`."""
        state_dict = parse_safetensors(self.weights, self.uri)
        check_values(state_dict, self.uri)
        return state_dict

    def parquet_metadata(self) -> dict[str, str]:
        """Build the file metadata of Parquet files with this checkpoint's predictions."""
        preprocessing = asdict(self.preprocessing) | {"resize_size": self.preprocessing.resize_size}
        return {
            "catsdogs.version": __version__,
            "catsdogs.model_sha256": self.sha256,
            "catsdogs.class_names": json.dumps(self.class_names),
            "catsdogs.preprocessing": json.dumps(preprocessing),
        }


class CheckpointConfig(NamedTuple):
    """The content of `config.json`; `calibration` is not checked, and None if there is none."""

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    calibration: object


def read_checkpoint(uri: str) -> CheckpointFiles:
    """Read a checkpoint directory; raises InputError if a file is missing or damaged, or a tensor does not fit."""
    class_names, preprocessing, calibration = read_config(uri)
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    try:
        tensors = dict(deserialize(weights))
    except SafetensorError as error:
        raise InputError(f"{uri} is not a safetensors file: {error}") from error
    shapes = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    check_shapes(list_shapes(len(class_names)), shapes, uri)
    unknown = sorted({tensor["dtype"] for tensor in tensors.values()} - set(DTYPES))
    if unknown:
        raise InputError(f"{uri}: expected weights in {' '.join(DTYPES)}, found {' '.join(unknown)}")
    return CheckpointFiles(uri, weights, class_names, preprocessing, hashlib.sha256(weights).hexdigest(), calibration)


def list_shapes(num_classes: int) -> dict[str, Shape]:
    """Map the name of every tensor of `resnet.ResNet50` to its shape, without torch."""
    convs: list[tuple[str, str, Shape]] = [("conv1", "bn1", (64, 3, 7, 7))]
    channels = 64
    for layer, (num_blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for i in range(num_blocks):
            block = f"layer{layer}.{i}"
            convs.append((f"{block}.conv1", f"{block}.bn1", (width, channels, 1, 1)))
            convs.append((f"{block}.conv2", f"{block}.bn2", (width, width, 3, 3)))
            convs.append((f"{block}.conv3", f"{block}.bn3", (4 * width, width, 1, 1)))
            if i == 0:
                convs.append((f"{block}.downsample.0", f"{block}.downsample.1", (4 * width, channels, 1, 1)))
            channels = 4 * width
    shapes: dict[str, Shape] = {f"{HEAD}.weight": (num_classes, NUM_FEATURES), f"{HEAD}.bias": (num_classes,)}
    for conv, norm, shape in convs:
        shapes |= {f"{conv}.weight": shape, f"{norm}.{BATCH_COUNTER}": ()}
        shapes |= {f"{norm}.{name}": shape[:1] for name in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def write_checkpoint(
    uri: str, state_dict: "Mapping[str, torch.Tensor]", class_names: tuple[str, ...], preprocessing: Preprocessing
) -> None:
    """Write a checkpoint directory, each file atomically; the tensors may be on any device."""
    for name, content in serialize_checkpoint(state_dict, class_names, preprocessing).items():
        storage.write_bytes(storage.join(uri, name), content)


def serialize_checkpoint(
    state_dict: "Mapping[str, torch.Tensor]", class_names: tuple[str, ...], preprocessing: Preprocessing
) -> dict[str, bytes]:
    """Build the files of a checkpoint directory, in the order to write them."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    return {CONFIG: serialize_config(class_names, preprocessing), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def serialize_config(
    class_names: tuple[str, ...], preprocessing: Preprocessing, calibration: Mapping[str, Any] | None = None
) -> bytes:
    """Build `config.json`."""
    config = _build_config(class_names, preprocessing)
    return json.dumps(config | ({} if calibration is None else {CALIBRATION: calibration}), indent=2).encode()


def parse_safetensors(content: bytes, source: str) -> "dict[str, torch.Tensor]":
    """Parse a safetensors file; floating-point tensors become fp32. Raises InputError with `source`."""
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: an unknown dtype
        raise InputError(f"{source} is not a safetensors file: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    """Raise an InputError if keys are missing, unexpected or of another shape; BatchNorm's counters may be missing."""
    problems = {
        "missing": [name for name in expected.keys() - found.keys() if not name.endswith(BATCH_COUNTER)],
        "unexpected": list(found.keys() - expected.keys()),
        "of another shape": [name for name in expected.keys() & found.keys() if expected[name] != found[name]],
    }
    if any(problems.values()):
        described = "; ".join(f"{what}: {format_keys(names)}" for what, names in problems.items() if names)
        raise InputError(
            f"{source}: expected the tensors of a ResNet50 under torchvision's key names; keys {described}; "
            f"{_describe_model(found)}check --weights or --checkpoint"
        )


def check_values(state_dict: Mapping[str, Any], source: str) -> None:
    """Raise an InputError if a tensor or array has NaN or infinity, or a BatchNorm has a negative variance."""
    damaged = [
        name
        for name, tensor in state_dict.items()
        if not np.isfinite(np.asarray(tensor)).all() or (name.endswith("running_var") and (tensor < 0).any())
    ]
    if damaged:
        raise InputError(
            f"{source}: expected finite numbers and no negative variance, not so in {format_keys(damaged)}; the "
            "training diverged or the file is damaged: use the checkpoint of an earlier epoch"
        )


def _describe_model(names: Iterable[str]) -> str:
    """Describe the model that has tensors of these names, if it is known and no ResNet50."""
    text = "\n".join(names)
    if "layer1.0.conv2." in text and "layer1.0.conv3." not in text:
        return "these are of a ResNet18 or 34; "
    return next((f"these are of {model}; " for part, model in FOREIGN_KEYS.items() if part in text), "")


def format_keys(names: Iterable[str]) -> str:
    """List the first keys in order, and count the others."""
    ordered = sorted(names)
    shown = ordered[:MAX_NAMED_KEYS]
    while len(shown) > 1 and len(", ".join(shown)) > MAX_KEYS_LENGTH:
        shown.pop()
    more = f" and {len(ordered) - len(shown)} more" if len(shown) < len(ordered) else ""
    return ", ".join(shown)[:MAX_KEYS_LENGTH] + more


def _build_config(class_names: tuple[str, ...], preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "architecture": "resnet50",
        "num_classes": len(class_names),
        "num_features": NUM_FEATURES,
        "global_pool": "avg",
        "label_names": list(class_names),
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
        "pretrained_cfg": {
            "input_size": [3, preprocessing.img_size, preprocessing.img_size],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(class_names),
            "pool_size": [7, 7],
            "first_conv": "conv1",
            "classifier": HEAD,
        },
    }


def read_config(uri: str) -> CheckpointConfig:
    """Read a checkpoint's `config.json`; raises InputError if the file is missing or another's."""
    path = storage.join(uri, CONFIG)
    content = storage.read_bytes(path)
    try:
        config = json.loads(content)
        pretrained = config["pretrained_cfg"]
        preprocessing = Preprocessing(
            img_size=int(pretrained["input_size"][1]),
            crop_pct=float(pretrained["crop_pct"]),
            mean=pretrained["mean"],
            std=pretrained["std"],
        )
        class_names = _parse_class_names(config["label_names"])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, InputError) as error:
        raise InputError(f"{path}: expected the settings of a checkpoint that catsdogs wrote: {error!r}") from error
    if config.get("architecture") != "resnet50":
        raise InputError(f"{path}: expected the architecture resnet50, got {config.get('architecture')!r}")
    if pretrained.get("interpolation") != preprocessing.interpolation:
        raise InputError(
            f"{path}: expected {preprocessing.interpolation} interpolation, the only one that evaluate and score have, "
            f"got {pretrained.get('interpolation')!r}; fine-tune it: catsdogs train --weights {uri}"
        )
    return CheckpointConfig(class_names, preprocessing, config.get(CALIBRATION))


def _parse_class_names(names: Any) -> tuple[str, ...]:
    """Check the names of a JSON file; raises ValueError."""
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(f"label_names must be a list of different names, not {names!r}")
    "".join(map(str, names)).encode()  # half of a surrogate pair is no Unicode text, and Parquet cannot have it
    return tuple(map(str, names))


def read_label_names(uri: str) -> tuple[str, ...]:
    """Read the class names in the `config.json` of any program; empty if it has none."""
    path = storage.join(uri, CONFIG)
    if not storage.exists(path):
        return ()
    try:
        config = json.loads(storage.read_bytes(path))
        names = config.get("label_names") or config["pretrained_cfg"]["label_names"]
        return tuple(map(str, names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        logger.debug("no class names in %s", path, exc_info=True)
        return ()
