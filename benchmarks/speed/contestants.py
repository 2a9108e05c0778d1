"""The commands that are timed, and the number of images of each."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.timing import Timing, time_command

CATSDOGS = os.path.join(os.path.dirname(sys.executable), "catsdogs")
FLAGS = ("--images", "{images}", "--checkpoint", "{checkpoint}", "--output", "{output}")


@dataclass(frozen=True)
class Contestant:
    """A command on a folder of images.

    Attributes:
        command: its words may contain {images}, {checkpoint} and {output}.
        part: the folder of the photographs that the images are taken from.
    """

    name: str
    command: tuple[str, ...]
    num_images: int
    part: str = "."

    def run(self, images: Path, checkpoint: Path, work: Path) -> Timing:
        """Run the command on `num_images` of the images."""
        output = work / "out"
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        folder = copy_sample(images / self.part, self.num_images, work / f"{self.part}-{self.num_images}")
        return time_command(self.format_command(folder, checkpoint, output), work)

    def format_command(self, images: object, checkpoint: object, output: object) -> list[str]:
        """Put paths or URIs into the command."""
        return [word.format(images=images, checkpoint=checkpoint, output=output) for word in self.command]


def copy_sample(images: Path, count: int, folder: Path) -> Path:
    """Copy `count` images, or all where there are fewer, into a folder; they are spread evenly over all images."""
    found = sorted(images.rglob("*.jpg"))
    count = min(count, len(found))
    for i in range(count if not folder.exists() else 0):
        path = found[i * len(found) // count]
        link_or_copy(path, folder / path.relative_to(images))
    return folder


def link_or_copy(path: Path, target: Path) -> None:
    """Link a file that does not change, or copy it to another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def module_command(name: str, *more: str) -> tuple[str, ...]:
    """Build the command that runs a module of this package."""
    return (sys.executable, "-m", f"benchmarks.speed.{name}", *FLAGS, *more)


def _train_command(*more: str) -> tuple[str, ...]:
    flags = ("--data-dir", "{images}", "--weights", "{checkpoint}", "--storage-path", "{output}")
    return (CATSDOGS, "train", *flags, *more)


CLASS_NAMES = ("cats", "dogs")
SCORE = ("score", "--input", "{images}", "--checkpoint", "{checkpoint}", "--output", "{output}")
OURS, LOOP = "`catsdogs score`", "torch DataLoader, tuned"
ALONE, WITHOUT_RAY, RAY = "our model alone", "our pipeline without Ray", "Ray's documentation"
ROOFLINE, OPENVINO = "the roofline", "OpenVINO, model alone"
SCORING = (
    Contestant(OURS, (CATSDOGS, *SCORE), 3000),
    Contestant(WITHOUT_RAY, module_command("ours.pipeline"), 600),
    Contestant(ALONE, module_command("ours.model"), 480),
    Contestant(OPENVINO, module_command("peers.openvino_model"), 480),
    Contestant(f"{OPENVINO}, tuned", module_command("peers.openvino_model", "--tuned"), 480),
    Contestant(ROOFLINE, module_command("ours.roofline"), 252),
    Contestant(RAY, module_command("peers.ray_docs"), 200),
    Contestant(f"{RAY}, tuned", module_command("peers.ray_docs", "--tuned"), 600),
    Contestant("torch DataLoader", module_command("peers.loader"), 200),
    Contestant(LOOP, module_command("peers.loader", "--tuned"), 600),
    Contestant("timm", module_command("peers.timm_loop"), 200),
    Contestant("timm, tuned", module_command("peers.timm_loop", "--tuned"), 600),
    Contestant("Daft", module_command("peers.daft_udf"), 200),
    Contestant("Daft, tuned", module_command("peers.daft_udf", "--tuned"), 600),
)
DECODING, TURBO = "our decoding", "libjpeg-turbo, torch's resize"
DECODERS = (
    Contestant(DECODING, module_command("ours.decoding"), 3000),
    Contestant(TURBO, module_command("peers.turbo_decoding"), 3000),
    Contestant("Pillow, `ResNet50_Weights.transforms()`", module_command("peers.decoding"), 3000),
)
TRAINING, STEP, REFERENCE = "`catsdogs train`", "our training step alone", "torchvision's reference loop"
TUNED_REFERENCE = f"{REFERENCE}, tuned"
TRAINERS = (
    Contestant(TRAINING, _train_command("--epochs", "1", "--val-split", "0.1"), 480, "train"),
    Contestant(STEP, module_command("ours.training_step"), 256, "train"),
    Contestant(REFERENCE, module_command("peers.reference_training"), 160, "train"),
    Contestant(TUNED_REFERENCE, module_command("peers.reference_training", "--tuned"), 320, "train"),
    Contestant("Ray's documentation, training", module_command("peers.ray_training"), 96, "train"),
)
FROZEN, EPOCH = "`catsdogs train --freeze backbone`, 10 epochs", "DataLoader, tuned, an epoch"
NOTEBOOK = (  # the trained head of the last one is used by agreement.py
    Contestant(EPOCH, module_command("peers.frozen_loop", "--tuned"), 3000),
    Contestant(FROZEN, _train_command("--freeze", "backbone", "--augment", "none", "--epochs", "10"), 3000),
)
IN_MEMORY = (*SCORING[2:6], TRAINERS[1])  # they read no files
