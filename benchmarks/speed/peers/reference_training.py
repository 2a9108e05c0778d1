"""Fine-tuning all layers as torchvision's classification reference does: ImageFolder, DataLoader, SGD in fp32.

https://github.com/pytorch/vision/tree/main/references/classification; tuned: bf16 autocast, channels last, one loading
process.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.speed.peers.common import MEAN, STD, arguments, load_model, tell

BATCH_SIZE = 32


def main() -> None:
    """Train one epoch."""
    options = arguments()
    steps = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    transforms = v2.Compose([*steps, v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD)])
    batches = DataLoader(
        ImageFolder(options.images, transforms), BATCH_SIZE, shuffle=True, num_workers=1 if options.tuned else 2
    )
    layout = torch.channels_last if options.tuned else torch.contiguous_format
    model = load_model(options.checkpoint).train().to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    objective = nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, targets in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.tuned):
            loss = objective(model(images.contiguous(memory_format=layout)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(len(targets))


if __name__ == "__main__":
    main()
