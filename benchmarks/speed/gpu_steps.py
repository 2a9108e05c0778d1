"""Parts of training and scoring on a GPU, in memory."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.speed.contestants import CLASS_NAMES
from benchmarks.speed.gpu_checks import build_step
from benchmarks.speed.ours.decoding import decode_for_model
from benchmarks.speed.peers.torchvision_model import to_model_input
from benchmarks.speed.protocol import BATCH_SIZE, DEVICE
from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing
from catsdogs.images.tensors import Resize, crop_centre, normalize, resize_one_by_one, resize_tensors
from catsdogs.images.torch_decoders import decode_jpegs
from catsdogs.inference_model import InferenceBackbone
from catsdogs.resnet import ResNet50, build_resnet50
from catsdogs.train.model import CompiledModel, Forward, set_learning_rate

NUM_DECODED = 600
MIN_RATE_S = 0.7  # that a rate is measured over


def measure(images: Path, img_size: int, is_smoke: bool) -> Iterator[tuple[str, float]]:
    """Yield rates in images per second, the most important first."""
    sizes = (8,) if is_smoke else (32, 64, BATCH_SIZE)
    for batch_size in sizes:
        for what, graph in (("CUDA graph", True), ("eager", False)):
            yield (
                f"training step, bf16, {what}, batches of {batch_size}, img/s",
                _step_rate(batch_size, img_size, graph),
            )
    if not is_smoke:
        yield (
            f"training step, bf16, compiled, CUDA graph, batches of {BATCH_SIZE}, img/s",
            _compiled_step_rate(img_size),
        )
        yield f"training step, eager fp32, batches of {BATCH_SIZE}, img/s", measure_eager_step(BATCH_SIZE, img_size)
    yield from _measure_model(sizes[-1], img_size)
    yield from _measure_decoding(images, sizes[-1], is_smoke)


def measure_eager_step(batch_size: int, img_size: int) -> float:
    """Measure a training step as tutorials write it, in images per second."""
    model = build_resnet50(len(CLASS_NAMES), seed=0).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images_NCHW = torch.zeros((batch_size, 3, img_size, img_size), device=DEVICE)
    targets_N = torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images_NCHW), targets_N).backward()
        optimizer.step()

    return _rate(step, batch_size)


def _step_rate(batch_size: int, img_size: int, graph: bool, wrap: Callable[[ResNet50], Forward] | None = None) -> float:
    config = TrainConfig(data_dir="", batch_size=batch_size)
    step, optimizer = build_step(config, DEVICE, print if graph else None, wrap)
    set_learning_rate(optimizer, 0.001, DEVICE)
    images_NHWC = torch.zeros((batch_size, img_size, img_size, 3), dtype=torch.uint8, device=DEVICE)
    targets_N = torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)
    return _rate(lambda: step((images_NHWC, targets_N)), batch_size)


def _compiled_step_rate(img_size: int) -> float:
    return _step_rate(BATCH_SIZE, img_size, True, lambda model: CompiledModel(model, BATCH_SIZE, print))


@torch.inference_mode()
def _measure_model(batch_size: int, img_size: int) -> Iterator[tuple[str, float]]:
    model, preprocessing = build_resnet50(len(CLASS_NAMES), seed=0).eval(), Preprocessing()
    shape = (batch_size, 3, img_size, img_size)
    images_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    plain, fused = (InferenceBackbone(model.state_dict(), "bf16", DEVICE, plain) for plain in (True, False))
    forms: dict[str, nn.Module | InferenceBackbone] = {
        "eager fp32, NCHW": model.to(DEVICE),
        "bf16, channels last, BatchNorm folded": plain,
        "the same, residual add and ReLU inside the convolutions": fused,
    }
    for what, form in forms.items():
        rate = _rate(partial(_classify, form, images_NCHW, preprocessing), batch_size)
        yield f"the model alone: {what}, batches of {batch_size}, img/s", rate


def _classify(
    form: nn.Module | InferenceBackbone, images_NCHW: torch.Tensor, preprocessing: Preprocessing
) -> torch.Tensor:
    inputs_NCHW = normalize(images_NCHW, preprocessing.mean, preprocessing.std)
    if isinstance(form, InferenceBackbone):
        return form(inputs_NCHW.to(torch.bfloat16, memory_format=torch.channels_last))
    return form(to_model_input(inputs_NCHW, form))  # type: ignore[no-any-return]


def _measure_decoding(images: Path, batch_size: int, is_smoke: bool) -> Iterator[tuple[str, float]]:
    paths = sorted(images.rglob("*.jpg"))[: batch_size if is_smoke else NUM_DECODED]
    encoded = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths[:batch_size]]
    decoded = decode_jpegs(encoded, DEVICE)
    forms: dict[str, Callable[[], object]] = {
        "decoding": lambda: decode_jpegs(encoded, DEVICE),
        "decoding and resizing": lambda: resize_tensors(*_crop(decode_jpegs(encoded, DEVICE))),
        "resizing": lambda: resize_tensors(*_crop(decoded)),
        "resizing one by one": lambda: resize_one_by_one(*_crop(decoded)),
    }
    for what, call in forms.items():
        yield f"one thread on the device, {what}, img/s", _rate(call, len(encoded))
    if is_smoke:
        return
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        on_cpus = _rate(lambda: pool.map(_decode_files, [paths] * cores, 1), len(paths) * cores)
    yield f"CPUs, decoding and resizing, {cores} processes, img/s", on_cpus


def _crop(images: Sequence[torch.Tensor]) -> tuple[list[Resize], int]:
    preprocessing = Preprocessing()
    size = preprocessing.img_size
    return [crop_centre(image, preprocessing.resize_size, size) for image in images], size


def _decode_files(paths: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    for path in paths:
        decode_for_model(path.read_bytes())


def _rate(call: Callable[[], object], num_images: int) -> float:
    """Measure images per second of a call that processes `num_images`, after warm-up and capture."""
    for _ in range(5):
        call()
    _synchronize()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < MIN_RATE_S:
        call()
        _synchronize()
        done += num_images
    return done / (time.perf_counter() - start)


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
