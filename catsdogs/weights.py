"""Read, check and load the initial weights of a training run.

Weights come from many programs. Only the tensors count: nested dicts are unwrapped, prefixes of keys removed, and a
head that does not fit is replaced. The driver reads and checks them, without torch where that is possible; each worker
loads them.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from catsdogs import storage
from catsdogs.checkpoint import (
    BATCH_COUNTER,
    HEAD,
    WEIGHTS,
    Shape,
    check_shapes,
    check_values,
    format_keys,
    list_shapes,
    parse_safetensors,
    read_label_names,
)
from catsdogs.errors import InputError
from catsdogs.labels import normalize_name
from catsdogs.safetensors_arrays import parse_safetensors_arrays
from catsdogs.text import format_names, format_reason

if TYPE_CHECKING:
    import torch

    from catsdogs.resnet import ResNet50

# torchvision's ResNet50_Weights.IMAGENET1K_V2.
IMAGENET_URL = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
IMAGENET_SHA256 = "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"
IMAGENET, NONE = "imagenet", "none"  # values of --weights
NUM_IMAGENET_CLASSES = 1000

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # .tar: .pth.tar
FOLDER_FILES = (WEIGHTS, "pytorch_model.bin")  # of this program, timm and Hugging Face
COMPILED = "_orig_mod."  # torch.compile puts it before the names of the module that it wraps
STEM = "conv1.weight"  # with its prefix, the key of the first convolution
BLOCK = re.compile(r"(^|\.)layer\d\.\d+\.$")
LAYERS = {name.partition(".")[0] for name in list_shapes(1)}

T = TypeVar("T")
StateDict = dict[str, "torch.Tensor"]
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class PretrainedWeights:
    """The file of `--weights`, which can be sent to workers that do not see it.

    Attributes:
        source: the value of `--weights`.
        uri: of the file.
        head_names: class names of its head if known.
    """

    source: str
    uri: str
    content: bytes
    head_names: tuple[str, ...] | None = None

    def check(self, class_names: tuple[str, ...]) -> str:
        """Check that the weights fit a model of these classes; return a message for the user.

        Raises:
            InputError: the weights are damaged or do not fit.
        """
        if self.source == IMAGENET:  # known by its SHA-256
            return f"weights from {IMAGENET}; {_describe_new_head(class_names, NUM_IMAGENET_CLASSES)}"
        tensors = self._parse_arrays()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        left_out = _list_other_layers(shapes)
        kept, own_head = self._select(shapes, class_names)
        check_shapes(list_shapes(len(class_names)), {name: shapes[name] for name in kept} | own_head, self.source)
        check_values({name: tensors[name] for name in kept}, self.source)
        note = f"; left out: {format_keys(left_out)}" if left_out else ""
        if not own_head:
            return f"weights and head from {self.source}{note}"
        num_classes = shapes[f"{HEAD}.bias"][0] if f"{HEAD}.bias" in shapes else None
        return f"weights from {self.source}; {_describe_new_head(class_names, num_classes)}{note}"

    def load(self, model: "ResNet50", class_names: tuple[str, ...]) -> None:
        """Load the weights into a model, the head only if it has the same classes; raises as `check`."""
        state = self.parse()
        kept, own_head = self._select({name: tuple(tensor.shape) for name, tensor in state.items()}, class_names)
        own_state = model.state_dict()
        tensors = {name: state[name] for name in kept} | {name: own_state[name] for name in own_head}
        load_state_dict_strictly(model, tensors, self.source)

    def _select(self, shapes: Shapes, class_names: tuple[str, ...]) -> tuple[set[str], Shapes]:
        """Select the tensors to load; return their names, and what the model keeps: its head or nothing."""
        head = _select_head(shapes)
        own_head = _select_head(list_shapes(len(class_names)))
        same_classes = self.head_names is None or tuple(map(normalize_name, self.head_names)) == class_names
        left_out = _list_other_layers(shapes)
        if head == own_head and same_classes and self.source != IMAGENET:
            return shapes.keys() - left_out, {}
        return shapes.keys() - left_out - head.keys(), own_head

    def parse(self) -> StateDict:
        """Parse the tensors to fp32, with the names of a ResNet50; raises InputError if that is not possible."""
        if self._is_safetensors:
            return _strip_prefix(parse_safetensors(self.content, self.uri), self.uri)
        from catsdogs.torch_files import parse_torch_file  # not at the top: imports torch

        return _strip_prefix(parse_torch_file(self.content, self.uri), self.uri)

    def _parse_arrays(self) -> Mapping[str, Any]:
        """Parse the tensors, those of safetensors to arrays without torch."""
        return (
            _strip_prefix(parse_safetensors_arrays(self.content, self.uri), self.uri)
            if self._is_safetensors
            else self.parse()
        )

    @property
    def _is_safetensors(self) -> bool:
        return self.uri.lower().endswith(SAFETENSORS_SUFFIX)


def read_pretrained(weights: str) -> PretrainedWeights:
    """Read the file of `--weights`: of `imagenet`, or of a path or URI of a file or a checkpoint directory.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if weights == IMAGENET:
        return _read_imagenet()
    uri = storage.absolute(weights)
    if uri.lower().endswith((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
        return PretrainedWeights(weights, uri, storage.read_bytes(uri))
    for name in FOLDER_FILES:
        file = storage.join(uri, name)
        if storage.exists(file):
            return PretrainedWeights(weights, file, storage.read_bytes(file), read_label_names(uri))
    raise InputError(
        f"--weights {weights}: expected imagenet, none, a file ({SAFETENSORS_SUFFIX} {' '.join(TORCH_SUFFIXES)}) or a "
        f"checkpoint directory with {' or '.join(FOLDER_FILES)}; found none of these"
    )


def load_pretrained(model: "ResNet50", weights: str, class_names: tuple[str, ...]) -> str:
    """Read, check and load initial weights in one process; return a message for the user.

    Args:
        weights: `imagenet`, `none`, a path or URI of a file of torch.save or safetensors, or a checkpoint directory.

    Raises:
        InputError: the weights cannot be read or do not fit.
    """
    if weights == NONE:
        return "random weights"
    pretrained = read_pretrained(weights)
    message = pretrained.check(class_names)
    pretrained.load(model, class_names)
    return message


def load_state_dict_strictly(model: "ResNet50", state: "Mapping[str, torch.Tensor]", source: str) -> None:
    """Load a state dict with exactly the model's keys and shapes; raises as `check_shapes` and `check_values`."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(own, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    check_values(state, source)
    model.load_state_dict(state, strict=False)


def _strip_prefix(state: Mapping[str, T], source: str) -> dict[str, T]:
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


def _select_head(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(f"{HEAD}.")}


def _list_other_layers(names: Collection[str]) -> set[str]:
    """List the tensors beside a whole ResNet50, such as another head; none if the ResNet50 is not whole."""
    required = {name for name in list_shapes(1) if not name.startswith(f"{HEAD}.") and not name.endswith(BATCH_COUNTER)}
    if not required <= set(names):
        return set()
    return {name for name in names if name.partition(".")[0] not in LAYERS}


def _describe_new_head(class_names: tuple[str, ...], num_replaced: int | None) -> str:
    replaced = "none" if num_replaced is None else f"{num_replaced} classes"
    return f"a new head for {len(class_names)} classes replaces its own ({replaced})"


def _read_imagenet() -> PretrainedWeights:
    """Read torchvision's weights from torch's cache, after a download if they are not there."""
    path = find_torch_cache() / IMAGENET_URL.rpartition("/")[2]
    try:
        if not path.exists():
            import torch  # seconds: not needed if they are there

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
    return PretrainedWeights(IMAGENET, str(path), content)


def find_torch_cache() -> Path:
    """Return the folder of weights in `torch.hub.get_dir()`, which is found from the same environment variables."""
    parent = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", os.path.join(parent, "torch"))).expanduser() / "hub" / "checkpoints"
