"""The inputs of the fault table: 2,000 small pictures, some of them bad files; a checkpoint; a manifest."""

import io
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.checkpoints import save_red_blue

N = 2000
BAD_EVERY = 20  # one of so many files is bad
CLASSES = ("blue", "red")
IMG_SIZE = 32
SHARD_SIZE = 100
POISON_INDEX = 1031
POISON = f"red/{POISON_INDEX:05d}-poison.png"  # contains POISON_MARK, see benchmarks/faults/poison
POISON_MARK = b"catsdogs-poison"
NUM_BLOCKS = N // SHARD_SIZE  # files of the manifest for the stock pipelines: as many as our parts


class Inputs:
    """The files under a work folder, created once."""

    def __init__(self, work: Path) -> None:
        self.checkpoint = work / "checkpoint"
        self._images = work / "images"
        self._names = work / "names.json"
        if not self._names.exists():
            self._create()
        self.names: list[str] = json.loads(self._names.read_text())

    @property
    def good_names(self) -> list[str]:
        """Return the relative paths of the files that are images."""
        return [name for name in self.names if not is_bad(name)]

    def link_images(self, name: str) -> Path:
        """Link the images into a folder of their own, so that its reads are counted separately."""
        folder = self._images.with_name(name)
        if not folder.exists():
            shutil.copytree(self._images, folder, copy_function=os.link)
        return folder

    def write_manifest(self, folder: Path, root: str) -> Path:
        """Write the paths of the images under a root as a Parquet file per block."""
        folder.mkdir(exist_ok=True)
        for block in range(NUM_BLOCKS):
            names = self.names[block * SHARD_SIZE : (block + 1) * SHARD_SIZE]
            pq.write_table(pa.table({"path": [f"{root}/{name}" for name in names]}), folder / f"{block:05d}.parquet")
        return folder

    def _create(self) -> None:
        contents = _draw_contents()
        for name, content in contents.items():
            (self._images / name).parent.mkdir(parents=True, exist_ok=True)
            (self._images / name).write_bytes(content)
        save_red_blue(self.checkpoint, CLASSES, IMG_SIZE, slope=1.0)
        self._names.write_text(json.dumps(sorted(contents)))


def picture(label: str, i: int) -> Image.Image:
    """Draw the i-th picture of a class: one colour with a little noise, each picture different."""
    rng = np.random.default_rng([CLASSES.index(label), i])
    strong, weak = rng.integers(100, 240), rng.integers(10, 90)
    color = (strong, 20, weak) if label == "red" else (weak, 20, strong)
    pixels = np.full((64, 64, 3), color, dtype=np.int16) + rng.integers(-8, 9, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def is_bad(name: str) -> bool:
    """Whether a file is damaged, or no image."""
    return "-" in name


def _draw_contents() -> dict[str, bytes]:
    """Create every file, good and bad; relative path -> content."""
    contents = {}
    for i in range(N):
        label = CLASSES[i % 2]
        if i % BAD_EVERY == 10 + i // BAD_EVERY % 2:
            kind, content = _bad(i)
            contents[f"{label}/{i:05d}-{kind}"] = content
        else:
            contents[f"{label}/{i:05d}.jpg"] = encoded(picture(label, i), "JPEG", quality=92)
    return contents


def _bad(i: int) -> tuple[str, bytes]:
    if i == POISON_INDEX:
        return "poison.png", _damaged_png(i) + POISON_MARK
    whole = encoded(picture("red", N + i), "JPEG", quality=92)
    kinds = (
        ("empty.jpg", b""),
        ("cut.jpg", whole[: len(whole) * 2 // 3]),
        ("text.jpg", b"not an image, but a line of text\n"),
        ("damaged.png", _damaged_png(i)),
    )
    return kinds[i // BAD_EVERY % len(kinds)]


def _damaged_png(i: int) -> bytes:
    """Flip bytes in the pixel data of a PNG: Pillow raises, libpng in torchvision kills its process."""
    content = bytearray(encoded(picture("blue", 2 * N + i), "PNG"))
    start = content.index(b"IDAT") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    for k in range(start + length // 3, start + length // 3 + 40):
        content[k] ^= 0xFF
    content[start + length : start + length + 4] = zlib.crc32(content[start - 4 : start + length]).to_bytes(4, "big")
    return bytes(content)
