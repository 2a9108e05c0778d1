"""Our model alone, on one batch again and again, in the memory of the device."""

import numpy as np
import torch

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.protocol import BATCH_SIZE, DEVICE, parse_arguments
from catsdogs.checkpoint import read_checkpoint
from catsdogs.predict import build_checked_predictor
from catsdogs.process_setup import configure_threads_and_malloc

NUM_BATCHES = 15 if DEVICE.type == "cpu" else 400


def main() -> None:
    """Classify the batch `NUM_BATCHES` times."""
    options = parse_arguments()
    files = read_checkpoint(options.checkpoint)
    size = files.preprocessing.img_size
    configure_threads_and_malloc(1)
    predictor, device_precision = build_checked_predictor(files.load_state_dict(), files.preprocessing, "auto", DEVICE)
    print(device_precision)
    random_NHWC = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, size, size, 3), dtype=np.uint8)
    images_NHWC = random_NHWC if DEVICE.type == "cpu" else torch.tensor(random_NHWC, device=DEVICE)
    for _ in range(NUM_BATCHES):
        predictor(images_NHWC)
        report_batch(BATCH_SIZE)


if __name__ == "__main__":
    main()
