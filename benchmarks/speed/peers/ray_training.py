"""Fine-tuning as in Ray's documentation: TorchTrainer around ImageFolder and DataLoader, one worker, fp32.

https://docs.ray.io/en/latest/train/examples/pytorch/pytorch_resnet_finetune.html
"""

from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import MEAN, STD, load_model
from benchmarks.speed.protocol import parse_arguments

BATCH_SIZE = 32


def train_loop(config: dict[str, Any]) -> None:
    """Train one epoch, `train_loop_per_worker`."""
    transforms = Compose([RandomResizedCrop(224), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])
    loader = DataLoader(ImageFolder(config["images"], transforms), BATCH_SIZE, shuffle=True, num_workers=1)
    batches = ray.train.torch.prepare_data_loader(loader)
    model = ray.train.torch.prepare_model(load_model(config["checkpoint"]).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    for images, targets in batches:
        with torch.set_grad_enabled(True):
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report_batch(len(targets))


def main() -> None:
    """Run the trainer."""
    options = parse_arguments()
    ray.init("local")
    TorchTrainer(
        train_loop,
        train_loop_config={"images": options.images, "checkpoint": options.checkpoint},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(storage_path=options.output),
    ).fit()


if __name__ == "__main__":
    main()
