"""One epoch of a frozen backbone under a new head, every image through the network; then validation.

As the notebooks do it: no augmentation, batches of 32. Tuned: the backbone in bf16 and channels last.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.speed.peers.common import arguments, load_model, optimized, suited, tell, transforms

BATCH_SIZE = 32


def main() -> None:
    """Train the head, then measure it."""
    options = arguments()
    backbone: nn.Module = load_model(options.checkpoint)
    backbone.fc = nn.Identity()
    if options.tuned:
        backbone = optimized(backbone)
    head = nn.Linear(2048, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for part in ("train", "validation"):
        files = ImageFolder(f"{options.images}/{part}", transforms())
        for images, targets in DataLoader(files, BATCH_SIZE, shuffle=part == "train", num_workers=1):
            with torch.inference_mode():
                features = backbone(suited(images, backbone)).float()
            logits = head(features.clone())
            if part == "train":
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, targets).backward()
                optimizer.step()
            tell(len(targets))


if __name__ == "__main__":
    main()
