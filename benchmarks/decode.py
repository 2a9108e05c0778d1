"""Decode and resize on one core: ours beside Pillow with torchvision's own transforms. Prints its table.

Usage: python benchmarks/decode.py [FOLDER]; without a folder it draws its own photographs' worth of JPEG files.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

from catsdogs.demo.drawings import KINDS, draw
from catsdogs.images import Preprocessing, decode

ROUNDS, NUM_IMAGES = 5, 200


def main() -> None:
    """Time both in turn, round by round, on the same bytes."""
    torch.set_num_threads(1)
    files = _read(Path(sys.argv[1])) if len(sys.argv) > 1 else _drawn()
    preprocessing, transforms = Preprocessing(), ResNet50_Weights.IMAGENET1K_V2.transforms()
    contenders: dict[str, Callable[[bytes], object]] = {
        "catsdogs": lambda content: preprocessing(decode(content).image),
        "Pillow + weights.transforms()": lambda content: transforms(Image.open(io.BytesIO(content)).convert("RGB")),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            started = time.perf_counter()
            for content in files:
                run(content)
            rates[name].append(len(files) / (time.perf_counter() - started))
    peer = median(rates["Pillow + weights.transforms()"])
    print(f"{len(files)} JPEG files of {sum(map(len, files)) / len(files) / 1000:.0f} kB, one thread, {ROUNDS} rounds")
    for name, found in rates.items():
        print(
            f"{name:32}{median(found):8.0f} img/s  ({min(found):.0f} to {max(found):.0f})  {median(found) / peer:.2f}x"
        )


def _read(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:NUM_IMAGES]]


def _drawn() -> list[bytes]:
    rng, files = np.random.default_rng(0), []
    for i in range(NUM_IMAGES):
        buffer = io.BytesIO()
        draw(KINDS[i % 2], rng, size=400).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


if __name__ == "__main__":
    main()
