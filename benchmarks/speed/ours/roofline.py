"""The roofline: matrix products in bf16, counted as the images whose forward pass has as many operations."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.protocol import parse_arguments
from catsdogs.config import TrainConfig
from catsdogs.resnet import ResNet50

SIDE = 4096  # of the matrices
NUM_PRODUCTS = 15


def count_flop() -> int:
    """Count the operations of ResNet50's forward pass on one image; a multiply-add counts as two."""
    size = TrainConfig(data_dir="").img_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ResNet50(num_classes=2)(torch.empty(2, 3, size, size))
    return int(counter.get_total_flops()) // 2


def main() -> None:
    """Multiply on all cores."""
    parse_arguments()
    flop_per_image = count_flop()
    left, right = (torch.ones((SIDE, SIDE), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(NUM_PRODUCTS):
        torch.mm(left, right)
        report_batch(2 * SIDE**3 / flop_per_image)


if __name__ == "__main__":
    main()
