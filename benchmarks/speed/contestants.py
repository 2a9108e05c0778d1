"""Who is timed, and on how many images."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.timing import Timing, timed

CATSDOGS = os.path.join(os.path.dirname(sys.executable), "catsdogs")
GIVEN = ("--images", "{images}", "--checkpoint", "{checkpoint}", "--output", "{output}")


@dataclass(frozen=True)
class Contestant:
    """A command that does something to a folder of images; `words` may name {images}, {checkpoint} and {output}."""

    name: str
    words: tuple[str, ...]
    num_images: int
    part: str = "."  # of the photographs

    def run(self, images: Path, checkpoint: Path, work: Path) -> Timing:
        """Run on so many of the images."""
        output = work / "out"
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        folder = sample(images / self.part, self.num_images, work / f"{self.part}-{self.num_images}")
        filled = {"images": folder, "checkpoint": checkpoint, "output": output}
        return timed([word.format(**filled) for word in self.words], work)


def sample(images: Path, count: int, folder: Path) -> Path:
    """Put so many images, evenly from all of them, into a folder of their own; all where there are fewer."""
    found = sorted(images.rglob("*.jpg"))
    count = min(count, len(found))
    for i in range(count if not folder.exists() else 0):
        path = found[i * len(found) // count]
        copy(path, folder / path.relative_to(images))
    return folder


def copy(path: Path, target: Path) -> None:
    """Copy a file that nobody will change, at no cost where both lie on one disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def module(name: str, *more: str) -> tuple[str, ...]:
    """Word the command of a module beside this one."""
    return (sys.executable, "-m", f"benchmarks.speed.{name}", *GIVEN, *more)


def _train(*more: str) -> tuple[str, ...]:
    given = ("--data-dir", "{images}", "--weights", "{checkpoint}", "--storage-path", "{output}")
    return (CATSDOGS, "train", *given, *more)


CLASS_NAMES = ("cats", "dogs")
SCORE = ("score", "--input", "{images}", "--checkpoint", "{checkpoint}", "--output", "{output}")
OURS, LOOP = "`catsdogs score`", "torch DataLoader, tuned"
ALONE, WITHOUT_RAY, RAY = "our model alone", "our pipeline without Ray", "Ray's documentation"
SCORING = (
    Contestant(OURS, (CATSDOGS, *SCORE), 3000),
    Contestant(WITHOUT_RAY, module("ours.pipeline"), 600),
    Contestant(ALONE, module("ours.model"), 480),
    Contestant("the roofline", module("ours.roofline"), 252),
    Contestant(RAY, module("peers.ray_docs"), 200),
    Contestant(f"{RAY}, tuned", module("peers.ray_docs", "--tuned"), 600),
    Contestant("torch DataLoader", module("peers.loader"), 200),
    Contestant(LOOP, module("peers.loader", "--tuned"), 600),
    Contestant("timm", module("peers.timm_loop"), 200),
    Contestant("timm, tuned", module("peers.timm_loop", "--tuned"), 600),
    Contestant("Daft", module("peers.daft_udf"), 200),
    Contestant("Daft, tuned", module("peers.daft_udf", "--tuned"), 600),
)
RESIDENT = (SCORING[2], SCORING[3])  # which read no files
DECODING, PILLOW = "our decoding", "Pillow, `ResNet50_Weights.transforms()`"
DECODERS = (
    Contestant(DECODING, module("ours.decoding"), 3000),
    Contestant(PILLOW, module("peers.decoding"), 3000),
)
TRAINING, EAGER = "`catsdogs train`", "torchvision's reference loop"
TRAINERS = (
    Contestant(TRAINING, _train("--epochs", "1", "--val-split", "0.1"), 480, "train"),
    Contestant(EAGER, module("peers.reference_training"), 320, "train"),
    Contestant(f"{EAGER}, tuned", module("peers.reference_training", "--tuned"), 320, "train"),
    Contestant("Ray's documentation, training", module("peers.ray_training"), 96, "train"),
)
FROZEN, EPOCH = "`catsdogs train --freeze backbone`, 10 epochs", "DataLoader, tuned, an epoch"
NOTEBOOK = (  # the last leaves the trained head that the agreement is measured with
    Contestant(EPOCH, module("peers.frozen_loop", "--tuned"), 3000),
    Contestant(FROZEN, _train("--freeze", "backbone", "--augment", "none", "--epochs", "10"), 3000),
)
