"""Checkpoints without training: random weights, and weights whose predictions are known beforehand."""

from pathlib import Path

import torch

from catsdogs.checkpoint import write_checkpoint
from catsdogs.images import Preprocessing
from catsdogs.resnet import build_resnet50


def save_random(folder: Path, class_names: tuple[str, ...]) -> None:
    """Save a ResNet50 with random weights, for images of 224 pixels."""
    state = build_resnet50(num_classes=len(class_names), seed=0).state_dict()
    write_checkpoint(str(folder), state, class_names, Preprocessing())


def save_red_blue(folder: Path, class_names: tuple[str, str], img_size: int, slope: float) -> None:
    """Save a ResNet50 whose two logits are proportional to an image's blue and red.

    Every block passes channels 0 and 1 through.
    """
    model = build_resnet50(num_classes=2, seed=0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "running_var" not in name:
                tensor.zero_()
        state = model.state_dict()
        state["conv1.weight"][0, 2, 3, 3] = state["conv1.weight"][1, 0, 3, 3] = 1.0
        state["bn1.weight"].fill_(1.0)
        state["bn1.bias"].fill_(3.0)  # normalised pixels reach down to about -2.1
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            for i in (0, 1):
                state[f"{layer}.0.downsample.0.weight"][i, i] = 1.0
            state[f"{layer}.0.downsample.1.weight"].fill_(1.0)
        state["fc.weight"][0, 0] = state["fc.weight"][1, 1] = slope
    write_checkpoint(str(folder), model.state_dict(), class_names, Preprocessing(img_size=img_size))
