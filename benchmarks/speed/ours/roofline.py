"""The roofline: matrix products in bf16, counted as the images whose forward pass has as many operations."""

import torch

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.protocol import parse_arguments

FLOP_PER_IMAGE = 8.18e9  # of ResNet50's forward pass at 224 pixels; a multiply-add counts as two
SIDE = 4096  # of the matrices
NUM_PRODUCTS = 15


def main() -> None:
    """Multiply on all cores."""
    parse_arguments()
    left, right = (torch.ones((SIDE, SIDE), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(NUM_PRODUCTS):
        torch.mm(left, right)
        report_batch(2 * SIDE**3 / FLOP_PER_IMAGE)


if __name__ == "__main__":
    main()
