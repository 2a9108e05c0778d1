"""A checkpoint as it is stored, in timm's local-dir layout. No torch: a driver hands it on as it is.

`config.json` beside `model.safetensors`; class names and preprocessing live in the former and nowhere else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, deserialize

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32")  # safetensors' names
LAYERS = ((3, 64, 256), (4, 128, 512), (6, 256, 1024), (3, 512, 2048))  # blocks, their inner channels and their last
COUNTER = "num_batches_tracked"  # of a BatchNorm; a checkpoint may lack it
Shape = tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's content; `weights` and their `sha256` are of its safetensors file."""

    uri: str
    weights: bytes
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    sha256: str


def read(uri: str) -> CheckpointFiles:
    """Read a checkpoint directory.

    Raises:
        InputError: a file is missing, or is not what it should be.
    """
    class_names, preprocessing = read_config(uri)
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    try:
        tensors = dict(deserialize(weights))
    except SafetensorError as error:
        raise InputError(f"{uri} is not a safetensors file: {error}") from error
    check_fits(
        resnet50_shapes(len(class_names)), {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}, uri
    )
    unknown = sorted({tensor["dtype"] for tensor in tensors.values()} - set(NUMBERS))
    if unknown:
        raise InputError(f"{uri}: expected weights in {' '.join(NUMBERS)}, found {' '.join(unknown)}")
    return CheckpointFiles(uri, weights, class_names, preprocessing, hashlib.sha256(weights).hexdigest())


def resnet50_shapes(num_classes: int) -> dict[str, Shape]:
    """List the tensors of a ResNet50 of torchvision's key names (He et al. 2015, table 1)."""
    shapes = _conv_shapes("conv1", "bn1", (64, 3, 7, 7))
    before = 64
    for layer, (num_blocks, inner, last) in enumerate(LAYERS, 1):
        for block in range(num_blocks):
            name = f"layer{layer}.{block}"
            shapes |= _conv_shapes(f"{name}.conv1", f"{name}.bn1", (inner, before, 1, 1))
            shapes |= _conv_shapes(f"{name}.conv2", f"{name}.bn2", (inner, inner, 3, 3))
            shapes |= _conv_shapes(f"{name}.conv3", f"{name}.bn3", (last, inner, 1, 1))
            if block == 0:
                shapes |= _conv_shapes(f"{name}.downsample.0", f"{name}.downsample.1", (last, before, 1, 1))
            before = last
    return shapes | {"fc.weight": (num_classes, before), "fc.bias": (num_classes,)}


def _conv_shapes(conv: str, norm: str, shape: Shape) -> dict[str, Shape]:
    of_channels = dict.fromkeys(
        (f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")), shape[:1]
    )
    return {f"{conv}.weight": shape, **of_channels, f"{norm}.{COUNTER}": ()}


def check_fits(own: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    """Compare the tensors that a model has with those that were found.

    Raises:
        InputError: names the keys that are missing, unexpected or of another shape.
    """
    missing = sorted(name for name in set(own) - set(found) if not name.endswith(COUNTER))
    unexpected = sorted(set(found) - set(own))
    shapes = sorted(name for name in set(own) & set(found) if own[name] != found[name])
    problems = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise InputError(
            f"{source} is no ResNet50 of torchvision's key names; keys {'; '.join(problems)}; check --weights"
        )


def config_bytes(class_names: tuple[str, ...], preprocessing: Preprocessing) -> bytes:
    """Lay out a checkpoint's `config.json`."""
    size = preprocessing.img_size
    config = {
        "architecture": "resnet50",
        "num_classes": len(class_names),
        "num_features": 2048,
        "global_pool": "avg",
        "label_names": list(class_names),
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(class_names),
            "pool_size": [7, 7],
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    return json.dumps(config, indent=2).encode()


def read_config(uri: str) -> tuple[tuple[str, ...], Preprocessing]:
    """Read a checkpoint's class names and preprocessing.

    Raises:
        InputError: the file is missing or is not one of ours.
    """
    path = storage.join(uri, CONFIG)
    content = storage.read_bytes(path)
    try:
        config = json.loads(content)
        wanted = config["pretrained_cfg"]
        preprocessing = Preprocessing(
            img_size=int(wanted["input_size"][1]),
            crop_pct=float(wanted["crop_pct"]),
            mean=wanted["mean"],
            std=wanted["std"],
        )
        class_names = _class_names(config["label_names"])
    except (ValueError, KeyError, TypeError, IndexError, InputError) as error:
        raise InputError(
            f"{path}: expected a checkpoint's settings, as catsdogs train writes them: {error!r}"
        ) from error
    if config.get("architecture") != "resnet50" or wanted.get("interpolation") != "bilinear":
        raise InputError(f"{path}: expected resnet50 with bilinear interpolation, got {config.get('architecture')!r}")
    return class_names, preprocessing


def _class_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(f"label_names must be a list of different names, not {names!r}")
    return tuple(map(str, names))
