"""One epoch of training a new head on a frozen backbone, then validation; every image passes the network.

As in the notebook: no augmentation, batches of 32. Tuned: the backbone in bf16 and channels last.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import build_transforms, load_model, optimize, to_model_input
from benchmarks.speed.protocol import parse_arguments

BATCH_SIZE = 32


def main() -> None:
    """Train the head, then validate it."""
    options = parse_arguments()
    backbone: nn.Module = load_model(options.checkpoint)
    backbone.fc = nn.Identity()
    if options.tuned:
        backbone = optimize(backbone)
    head = nn.Linear(2048, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for part in ("train", "validation"):
        files = ImageFolder(f"{options.images}/{part}", build_transforms())
        for images, targets in DataLoader(files, BATCH_SIZE, shuffle=part == "train", num_workers=1):
            with torch.inference_mode():
                features = backbone(to_model_input(images, backbone)).float()
            logits = head(features.clone())
            if part == "train":
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, targets).backward()
                optimizer.step()
            report_batch(len(targets))


if __name__ == "__main__":
    main()
