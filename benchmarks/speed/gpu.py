"""The same on a machine with a GPU; docs/benchmarks-gpu.md says what came.

python -m benchmarks.speed.gpu --images data/cats_and_dogs_filtered
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.speed.contestants import ALONE, CATSDOGS, CLASS_NAMES, LOOP, RAY, SCORE, Contestant, copy, module
from benchmarks.speed.ours.decoding import view
from benchmarks.speed.ours.model import NUM_BATCHES
from benchmarks.speed.page import HEAD, origin_of, read_revision, row, table
from benchmarks.speed.peers.common import BATCH_SIZE, DEVICE, suited
from benchmarks.speed.profiles import training_step
from benchmarks.speed.timing import Timing
from catsdogs import checkpoint
from catsdogs.fused import fused
from catsdogs.images import Preprocessing
from catsdogs.images.tensors import decode_jpegs, normalize
from catsdogs.model import backbone_for_inference, build
from catsdogs.train.compiled import Compiled

COPIES = 40  # of the photographs: the fastest are through 3,000 before they have begun
PACKAGES = ("torch", "torchvision", "ray", "pillow")
NUM_DECODED = 600
SECONDS = 1.0  # that a rate is taken over
OURS, ON_CPUS = "`catsdogs score`, decoding on the GPU", "`catsdogs score`, decoding on CPUs"
CONTESTANTS = (
    Contestant(OURS, (CATSDOGS, *SCORE), 120_000),
    Contestant(ON_CPUS, (sys.executable, "-m", "benchmarks.speed.ours.cpu_decoding", *SCORE), 60_000),
    Contestant(ALONE, module("ours.model"), NUM_BATCHES * BATCH_SIZE),
    Contestant(RAY, module("peers.ray_docs"), 6000),
    Contestant(LOOP, module("peers.loader", "--tuned"), 12_000),
)
INTRODUCTION = """# Benchmarks on a GPU

The same commands as in [benchmarks.md](benchmarks.md), in batches of {batch_size} and on the photographs {copies} times
over. Made by `{command}`: every command once. The weights are random, which costs the same.

Machine: {machine}; {when} UTC; revision {revision}.
"""


def main() -> None:
    """Time all of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="3,000 photographs")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-gpu.md"))
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("expected a GPU that torch can use, found none; python -m benchmarks.speed is for CPUs")
    origin = origin_of("benchmarks.speed.gpu", PACKAGES, read_revision())
    sections = [INTRODUCTION.format(batch_size=BATCH_SIZE, copies=COPIES, **origin)]
    with tempfile.TemporaryDirectory(prefix="catsdogs-") as name:
        for part in (_scoring, _model, _decoding, _training):
            sections += part(options.images, Path(name))
            options.page.write_text("\n".join([*sections, ""]))


def _scoring(images: Path, work: Path) -> list[str]:
    for i, path in enumerate(sorted(images.rglob("*.jpg")) * COPIES):
        copy(path, work / "images" / f"{i // 1000:03}" / f"{i:06}.jpg")
    checkpoint.save(str(work / "model"), build(len(CLASS_NAMES), seed=0), CLASS_NAMES, Preprocessing())
    timings: dict[str, list[Timing]] = {}
    for one in CONTESTANTS:
        timings[one.name] = [one.run(work / "images", work / "model", work)]
        print(f"{one.name}: {timings[one.name][0]}", flush=True)
    rows = [row(one.name, one.num_images, timings[one.name], timings[OURS]) for one in CONTESTANTS]
    return ["## Scoring\n", table(HEAD, rows)]


@torch.inference_mode()
def _model(_: Path, __: Path) -> list[str]:
    model, preprocessing = build(len(CLASS_NAMES), seed=0).eval(), Preprocessing()
    size = preprocessing.img_size
    images_NCHW = torch.randint(0, 256, (BATCH_SIZE, 3, size, size), dtype=torch.uint8, device=DEVICE)
    folded = backbone_for_inference(model, "bf16", DEVICE)
    forms = {
        "Eager fp32, NCHW": model.to(DEVICE),
        "bf16, channels last, BatchNorm folded": folded,
        "The same, additions and rectifications inside the convolutions": fused(folded),
    }
    lines = [f"## The model alone, batches of {BATCH_SIZE}\n"]
    for what, form in forms.items():
        rate = _rate(partial(_labelled, form, images_NCHW, preprocessing), BATCH_SIZE)
        lines.append(f"- {what}: {rate:,.0f} img/s.")
    return [*lines, ""]


def _labelled(form: nn.Module, images_NCHW: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    inputs_NCHW = normalize(images_NCHW, preprocessing.mean, preprocessing.std)
    return form(suited(inputs_NCHW, form))  # type: ignore[no-any-return]


def _decoding(images: Path, _: Path) -> list[str]:
    paths = sorted(images.rglob("*.jpg"))[:NUM_DECODED]
    preprocessing, cores = Preprocessing(), os.cpu_count() or 1
    encoded = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths[:BATCH_SIZE]]
    given = (preprocessing.resize_size, preprocessing.img_size, DEVICE)
    on_gpu = _rate(lambda: decode_jpegs(encoded, *given), len(encoded))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        on_cpus = _rate(lambda: pool.map(_decode, [paths] * cores, 1), len(paths) * cores)
    return [
        "## Decoding to the model's view\n",
        f"- One process on the GPU, batches of {BATCH_SIZE}: {on_gpu:,.0f} img/s.",
        f"- {cores} processes on {cores} cores: {on_cpus:,.0f} img/s.\n",
    ]


def _decode(paths: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    for path in paths:
        view(path.read_bytes())


def _training(_: Path, __: Path) -> list[str]:
    lines = ["## A training step on a batch in memory\n"]
    for batch_size in (32, BATCH_SIZE):
        lines += [
            f"- Eager fp32 in NCHW, batches of {batch_size}: {_eager_step_rate(batch_size):,.0f} img/s.",
            f"- Ours, bf16, batches of {batch_size}: {_step_rate(batch_size, compiled=False):,.0f} img/s.",
            f"- Ours, compiled, batches of {batch_size}: {_step_rate(batch_size, compiled=True):,.0f} img/s.",
        ]
    return lines


def _eager_step_rate(batch_size: int) -> float:
    """Take a step as tutorials do."""
    model = build(len(CLASS_NAMES), seed=0).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images_NCHW = torch.zeros((batch_size, 3, 224, 224), device=DEVICE)
    targets_N = torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images_NCHW), targets_N).backward()
        optimizer.step()

    return _rate(step, batch_size)


def _step_rate(batch_size: int, compiled: bool) -> float:
    model = build(len(CLASS_NAMES), seed=0).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped = Compiled(model, batch_size, lambda _: None) if compiled else model
    return _rate(training_step(model, wrapped, Preprocessing(), DEVICE, batch_size), batch_size)


def _rate(work: Callable[[], object], count: int) -> float:
    """Take the rate of what makes `count` images, warm."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        work()
        torch.cuda.synchronize()
        done += count
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
