"""Our model alone: the same decoded batches again and again."""

import numpy as np
import torch

from benchmarks.speed.peers.common import arguments, tell
from catsdogs import checkpoint
from catsdogs.predict import BATCH_SIZE, checked_predictor, settle

NUM_BATCHES = 15


def main() -> None:
    """Label batches that are in memory."""
    options = arguments()
    model = checkpoint.load(options.checkpoint)
    size = model.preprocessing.img_size
    settle(1)
    predictor, engine = checked_predictor(model.model, model.preprocessing, "auto", torch.device("cpu"))
    print(engine)
    images_NHWC = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, size, size, 3), dtype=np.uint8)
    for _ in range(NUM_BATCHES):
        predictor(images_NHWC)
        tell(BATCH_SIZE)


if __name__ == "__main__":
    main()
