"""Fine-tuning of all layers as in torchvision's classification reference: ImageFolder, DataLoader, SGD in fp32.

https://github.com/pytorch/vision/tree/main/references/classification; tuned: bf16 autocast, channels last, one loading
process.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import MEAN, STD, load_model
from benchmarks.speed.protocol import parse_arguments

BATCH_SIZE = 32


def main() -> None:
    """Train one epoch."""
    options = parse_arguments()
    steps = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    transforms = v2.Compose([*steps, v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD)])
    batches = DataLoader(
        ImageFolder(options.images, transforms), BATCH_SIZE, shuffle=True, num_workers=1 if options.tuned else 2
    )
    layout = torch.channels_last if options.tuned else torch.contiguous_format
    model = load_model(options.checkpoint).train().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, targets in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.tuned):
            loss = criterion(model(images.contiguous(memory_format=layout)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report_batch(len(targets))


if __name__ == "__main__":
    main()
