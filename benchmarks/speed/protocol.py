"""What every measured command does in the same way: its device, its flags and its images."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed.batch_report import report_batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH_SIZE = 256 if DEVICE.type == "cuda" else 32
IMAGES_PER_REPORT = 50  # of the decoders, which have no batches


def parse_arguments() -> argparse.Namespace:
    """Parse the flags that `contestants.py` passes."""
    parser = argparse.ArgumentParser()
    for name in ("--images", "--checkpoint", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tuned", action="store_true")
    return parser.parse_args()


def list_images(folder: str) -> list[str]:
    """List the JPEGs under a folder, sorted."""
    return sorted(str(path) for path in Path(folder).rglob("*.jpg"))


def decode_all(decode: Callable[[bytes], object]) -> None:
    """Decode files from memory on one core."""
    torch.set_num_threads(1)
    files = [Path(path).read_bytes() for path in list_images(parse_arguments().images)]
    for start in range(0, len(files), IMAGES_PER_REPORT):
        batch = files[start : start + IMAGES_PER_REPORT]
        for image_bytes in batch:
            decode(image_bytes)
        report_batch(len(batch))
