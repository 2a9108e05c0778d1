"""The roofline: products of matrices in bf16, counted in images: as many as their arithmetic would make."""

import torch

from benchmarks.speed.peers.common import arguments, tell

FLOP = 8.18e9  # of ResNet50's forward pass over one image of 224 pixels, two for each multiply and add
SIDE = 4096  # of the matrices
NUM_PRODUCTS = 15


def main() -> None:
    """Multiply; both cores work on each product."""
    arguments()
    left, right = (torch.ones((SIDE, SIDE), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(NUM_PRODUCTS):
        torch.mm(left, right)
        tell(2 * SIDE**3 / FLOP)


if __name__ == "__main__":
    main()
