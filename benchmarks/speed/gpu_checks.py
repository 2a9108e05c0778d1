"""What a GPU computes in another way than a CPU, compared: the graph of a step, augmentation, resizing."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from benchmarks.speed.protocol import DEVICE
from catsdogs.config import TrainConfig
from catsdogs.data import DecodeForTraining
from catsdogs.images import MAX_PIXELS, ImageArray, Preprocessing
from catsdogs.images.tensors import crop_centre, passes_trial, resize_one_by_one, resize_tensors
from catsdogs.resnet import ResNet50, build_resnet50
from catsdogs.schema import OK
from catsdogs.train.graph import Batch, GraphedStep, Step, capture_graph
from catsdogs.train.loop import train_step
from catsdogs.train.model import Forward, FullModel, build_optimizer, set_learning_rate
from catsdogs.train.resident import ResidentImages
from catsdogs.train.worker import Ranks

SIZES = ((375, 500), (500, 353), (224, 224), (97, 400), (60, 80))  # height and width of images


def run_checks(img_size: int, checked: tuple[int, int]) -> Iterator[tuple[str, float]]:
    """Yield figures: they should be near 0, or at most 1 level of 255.

    Args:
        checked: steps that are compared, and their batch size.
    """
    lines: list[str] = []
    num_steps, batch_size = checked
    for optimizer in ("sgd", "adamw"):
        config = _build_config(optimizer, img_size, batch_size)
        difference = compare_graph_with_eager(DEVICE, config, num_steps, lines.append)
        yield f"losses of {num_steps} steps, CUDA graph and eager, {optimizer}: largest relative difference", difference
    repeated = [_compute_losses(DEVICE, _build_config("sgd", img_size, batch_size), num_steps, None) for _ in range(2)]
    yield "the same, eager and eager, sgd", _compute_difference(*repeated)
    yield "steps that could not be captured", float(len(lines))
    images = [_draw(i, *size) for i, size in enumerate(SIZES)]
    for kind in ("none", "light", "affine"):
        yield (
            f"augmentation {kind} on the device and on a CPU: largest difference, levels",
            _compare(images, kind, img_size),
        )
    yield "the kernel that resizes works", float(DEVICE.type == "cuda" and passes_trial(DEVICE, img_size))
    tensors = [torch.from_numpy(image).to(DEVICE).permute(2, 0, 1) for image in images]
    resizes = [crop_centre(image, img_size + 8, img_size) for image in tensors]
    found, expected = (form(resizes, img_size).int() for form in (resize_tensors, resize_one_by_one))
    yield "resizing by one kernel and one by one: largest difference, levels", (found - expected).abs().max().item()


def _build_config(optimizer: str, img_size: int, batch_size: int) -> TrainConfig:
    name: Literal["sgd", "adamw"] = "adamw" if optimizer == "adamw" else "sgd"
    return TrainConfig(data_dir="", optimizer=name, img_size=img_size, batch_size=batch_size)


def compare_graph_with_eager(
    device: torch.device, config: TrainConfig, num_steps: int, report: Callable[[str], None]
) -> float:
    """Take steps on the same batches both ways, a smaller one among them; return the largest difference of losses.

    Args:
        report: receives a line if the step cannot be captured.
    """
    losses = [_compute_losses(device, config, num_steps, form) for form in (None, report)]
    print(f"losses, eager: {losses[0].tolist()}")
    print(f"losses, CUDA graph: {losses[1].tolist()}")
    return _compute_difference(*losses)


def _compute_difference(losses: torch.Tensor, others: torch.Tensor) -> float:
    return float(((losses - others).abs() / losses).max())


def _compute_losses(
    device: torch.device, config: TrainConfig, num_steps: int, report: Callable[[str], None] | None
) -> torch.Tensor:
    step, optimizer = build_step(config, device, report)
    batches = [_draw_batch(i, config.local_batch_size, config.img_size, device) for i in range(2)]
    batches.append((batches[0][0][:-1], batches[0][1][:-1]))
    losses = []
    for i in range(num_steps):
        set_learning_rate(optimizer, 2e-4 * (i + 1) / num_steps, device)
        batch = batches[2 if i == num_steps - 2 else i % 2]
        losses.append(step(batch)[0] / len(batch[1]))
    return torch.stack(losses).cpu()


def build_step(
    config: TrainConfig,
    device: torch.device,
    report: Callable[[str], None] | None,
    wrap: Callable[[ResNet50], Forward] | None = None,
) -> tuple[Step, torch.optim.Optimizer]:
    """Build a training step of ours in bf16, and its optimizer; with `report`, as a CUDA graph."""
    model = build_resnet50(2, seed=0).to(memory_format=torch.channels_last).to(device)
    forward = model if wrap is None else wrap(model)
    optimizer = build_optimizer(model, config)
    train_model = FullModel(model, forward, Preprocessing(), "bf16" if device.type == "cuda" else "fp32")
    step: Step = partial(train_step, train_model, optimizer, config=config, ranks=Ranks())
    if report is None:
        return step, optimizer
    return GraphedStep(step, optimizer, config.local_batch_size, report, capture_graph), optimizer


def _draw_batch(seed: int, batch_size: int, img_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, img_size, img_size, 3)
    images_NHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images_NHWC.to(device), (torch.arange(batch_size) % 2).to(device)


def _draw(seed: int, height: int, width: int) -> ImageArray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _compare(images: list[ImageArray], kind: str, img_size: int) -> float:
    """Compare the views of resident images with those of the stage that augments on a CPU."""
    stage = DecodeForTraining(Preprocessing(img_size=img_size), MAX_PIXELS, len(images), kind, 0, (1,))
    resident = ResidentImages(len(images), DEVICE)
    pixels = pa.array([image.tobytes() for image in images], pa.large_binary())
    heights, widths, _ = zip(*(image.shape for image in images), strict=True)
    columns = {"row": range(len(images)), "width": widths, "height": heights, "image": pixels}
    names = {"path": [""] * len(images), "status": [OK] * len(images), "error": [None] * len(images)}
    resident.add_pixels(pa.table({name: pa.array(values) for name, values in (columns | names).items()}))
    found = resident.augment(np.arange(len(images)), stage).cpu().numpy().astype(int)
    expected = np.stack([stage.transform(image, row) for row, image in enumerate(images)])
    return float(np.abs(found - expected).max())
