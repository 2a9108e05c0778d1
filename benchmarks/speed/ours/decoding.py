"""Our decoding and preprocessing, on one core."""

from pathlib import Path

import torch

from benchmarks.speed.peers.common import arguments, paths_of, tell
from catsdogs.images import Preprocessing, decode

TOLD = 50  # images


def main() -> None:
    """Decode files that are in memory."""
    torch.set_num_threads(1)
    files = [Path(path).read_bytes() for path in paths_of(arguments().images)]
    preprocessing = Preprocessing()
    for start in range(0, len(files), TOLD):
        for content in files[start : start + TOLD]:
            image = decode(content).image
            assert image is not None
            preprocessing(image)
        tell(len(files[start : start + TOLD]))


if __name__ == "__main__":
    main()
