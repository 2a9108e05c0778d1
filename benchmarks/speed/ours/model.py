"""Our model alone: the same decoded batch again and again; on a GPU it is in the GPU's memory."""

import numpy as np
import torch

from benchmarks.speed.peers.common import BATCH_SIZE, DEVICE, arguments, tell
from catsdogs import checkpoint
from catsdogs.predict import build_checked_predictor, configure_threads_and_malloc

NUM_BATCHES = 15 if DEVICE.type == "cpu" else 400


def main() -> None:
    """Label batches that are in memory."""
    options = arguments()
    model = checkpoint.load(options.checkpoint)
    size = model.preprocessing.img_size
    configure_threads_and_malloc(1)
    predictor, device_precision = build_checked_predictor(model.model, model.preprocessing, "auto", DEVICE)
    print(device_precision)
    drawn_NHWC = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, size, size, 3), dtype=np.uint8)
    images_NHWC = drawn_NHWC if DEVICE.type == "cpu" else torch.tensor(drawn_NHWC, device=DEVICE)
    for _ in range(NUM_BATCHES):
        predictor(images_NHWC)
        tell(BATCH_SIZE)


if __name__ == "__main__":
    main()
