"""Time catsdogs and its peers on a GPU, and write docs/benchmarks-gpu.md.

python -m benchmarks.speed.gpu --images data/cats_and_dogs_filtered

It prints a JSON line for each figure as soon as it is known, the most important first, and starts nothing after MAX_S.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from torch import nn

from benchmarks.checkpoints import save_random
from benchmarks.speed.agreement import compare_predictions, read_predictions
from benchmarks.speed.contestants import (
    ALONE,
    CATSDOGS,
    CLASS_NAMES,
    LOOP,
    RAY,
    SCORE,
    Contestant,
    link_or_copy,
    module_command,
)
from benchmarks.speed.ours.decoding import decode_for_model
from benchmarks.speed.ours.model import NUM_BATCHES
from benchmarks.speed.page import HEAD, describe_origin, format_row, format_table, read_revision
from benchmarks.speed.peers.torchvision_model import to_model_input
from benchmarks.speed.profiles import build_training_step
from benchmarks.speed.protocol import BATCH_SIZE, DEVICE
from benchmarks.speed.timing import Timing
from catsdogs.images import Preprocessing
from catsdogs.images.tensors import normalize, passes_trial, resize_and_crop_one_by_one, resize_and_crop_tensors
from catsdogs.images.torch_decoders import decode_jpegs
from catsdogs.inference_model import InferenceBackbone
from catsdogs.resnet import build_resnet50
from catsdogs.train.model import CompiledModel

COPIES = 40  # of the photographs: the fastest command ends with 3,000 while others still start
PACKAGES = ("torch", "torchvision", "ray", "pillow")
NUM_DECODED = 600
MIN_RATE_S = 1.0  # that a rate is measured over
MAX_S = 420.0  # after it, no measurement starts: the last one takes a minute at most
OURS, ON_CPUS = "`catsdogs score`, decoding on the GPU", "`catsdogs score`, decoding on CPUs"
CONTESTANTS = (
    Contestant(OURS, (CATSDOGS, *SCORE), 120_000),
    Contestant(LOOP, module_command("peers.loader", "--tuned"), 12_000),
    Contestant(ON_CPUS, (sys.executable, "-m", "benchmarks.speed.ours.cpu_decoding", *SCORE), 60_000),
    Contestant(ALONE, module_command("ours.model"), NUM_BATCHES * BATCH_SIZE),
    Contestant(RAY, module_command("peers.ray_docs"), 6000),
)
INTRODUCTION = """# Benchmarks on a GPU

The commands of [benchmarks.md](benchmarks.md) in batches of {batch_size}, on {copies} copies of the photographs. Made
by `{command}`: every command once. {weights}

Machine: {machine}; {when} UTC; revision {revision}.
"""
RANDOM_WEIGHTS = "The weights are random, which does not change the speed."


def main() -> None:
    """Measure every section of the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="3,000 photographs")
    parser.add_argument("--checkpoint", type=Path, help="for the agreement of labels; default: random weights")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-gpu.md"))
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("expected a GPU that torch can use, found none; python -m benchmarks.speed is for CPUs")
    origin = describe_origin("benchmarks.speed.gpu", PACKAGES, read_revision())
    weights = RANDOM_WEIGHTS if options.checkpoint is None else f"The checkpoint is {options.checkpoint.name}."
    sections = [INTRODUCTION.format(batch_size=BATCH_SIZE, copies=COPIES, weights=weights, **origin)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="catsdogs-") as name:
        work = Path(name)
        if options.checkpoint is None:
            save_random(work / "model", CLASS_NAMES)
        else:
            (work / "model").symlink_to(options.checkpoint.absolute())
        for measure in (_measure_scoring, _measure_training, _measure_decoding, _measure_model):
            if time.monotonic() - start > MAX_S:
                print(json.dumps({"skipped": measure.__name__.removeprefix("_measure_")}), flush=True)
                continue
            sections += measure(options.images, work)
            options.page.write_text("\n".join([*sections, ""]))


def _report(figure: str, value: float) -> None:
    """Print a figure, so that nothing is lost if the machine is taken away."""
    print(json.dumps({"figure": figure, "value": round(value, 4)}), flush=True)


def _measure_scoring(images: Path, work: Path) -> list[str]:
    for i, path in enumerate(sorted(images.rglob("*.jpg")) * COPIES):
        link_or_copy(path, work / "images" / f"{i // 1000:03}" / f"{i:06}.jpg")
    timings: dict[str, list[Timing]] = {}
    predictions: dict[str, pa.Table] = {}
    lines: list[str] = []
    for contestant in CONTESTANTS:
        timings[contestant.name] = [_time(contestant, work)]
        if contestant.name == LOOP:
            _report(f"{OURS} / {LOOP}", timings[OURS][0].rate / timings[LOOP][0].rate)
        if contestant.name in (OURS, ON_CPUS):
            predictions[contestant.name] = read_predictions(work / "out")
        if contestant.name == ON_CPUS:
            lines.append(_compare(predictions[OURS], predictions[ON_CPUS]))
    rows = [format_row(c.name, c.num_images, timings[c.name], timings[OURS]) for c in CONTESTANTS]
    return ["## Scoring\n", format_table(HEAD, rows), *lines]


def _time(contestant: Contestant, work: Path) -> Timing:
    timing = contestant.run(work / "images", work / "model", work)
    _report(f"{contestant.name}, images/s", timing.rate)
    _report(f"{contestant.name}, start-up, s", timing.start_s)
    return timing


def _compare(on_gpu: pa.Table, on_cpus: pa.Table) -> str:
    same, difference = compare_predictions(on_gpu, on_cpus)
    _report("labels that are the same, decoding on the GPU and on CPUs", same)
    _report("difference of their probabilities, maximum", difference)
    return (
        f"{same:.2%} of the images have the same label whether the GPU or CPUs decode them. Their probabilities differ "
        f"by {difference:.3f} at most.\n"
    )


@torch.inference_mode()
def _measure_model(_: Path, __: Path) -> list[str]:
    model, preprocessing = build_resnet50(len(CLASS_NAMES), seed=0).eval(), Preprocessing()
    size = preprocessing.img_size
    images_NCHW = torch.randint(0, 256, (BATCH_SIZE, 3, size, size), dtype=torch.uint8, device=DEVICE)
    plain, fused = (InferenceBackbone(model.state_dict(), "bf16", DEVICE, plain) for plain in (True, False))
    forms: dict[str, nn.Module | InferenceBackbone] = {
        "Eager fp32, NCHW": model.to(DEVICE),
        "bf16, channels last, BatchNorm folded": plain,
        "The same, residual add and ReLU inside the convolutions": fused,
    }
    lines = [f"## The model alone, batches of {BATCH_SIZE}\n"]
    for what, form in forms.items():
        rate = _rate(partial(_classify, form, images_NCHW, preprocessing), BATCH_SIZE)
        _report(f"model: {what}, images/s", rate)
        lines.append(f"- {what}: {rate:,.0f} img/s.")
    return [*lines, ""]


def _classify(
    form: nn.Module | InferenceBackbone, images_NCHW: torch.Tensor, preprocessing: Preprocessing
) -> torch.Tensor:
    inputs_NCHW = normalize(images_NCHW, preprocessing.mean, preprocessing.std)
    if isinstance(form, InferenceBackbone):
        return form(inputs_NCHW.to(torch.bfloat16, memory_format=torch.channels_last))
    return form(to_model_input(inputs_NCHW, form))  # type: ignore[no-any-return]


def _measure_decoding(images: Path, _: Path) -> list[str]:
    paths = sorted(images.rglob("*.jpg"))[:NUM_DECODED]
    preprocessing, cores = Preprocessing(), os.cpu_count() or 1
    encoded = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths[:BATCH_SIZE]]
    sizes = (preprocessing.resize_size, preprocessing.img_size)
    decoded = decode_jpegs(encoded, DEVICE)
    kernel = "one kernel" if passes_trial(DEVICE, *sizes) else "the kernel does not work here"
    forms: dict[str, Callable[[], object]] = {
        "decoding alone": lambda: decode_jpegs(encoded, DEVICE),
        f"decoding and resizing, {kernel}": lambda: resize_and_crop_tensors(decode_jpegs(encoded, DEVICE), *sizes),
        "resizing alone, one by one": lambda: resize_and_crop_one_by_one(decoded, *sizes),
        f"resizing alone, {kernel}": lambda: resize_and_crop_tensors(decoded, *sizes),
    }
    lines = ["## Decoding to the input of the model\n"]
    for what, call in forms.items():
        rate = _rate(call, len(encoded))
        _report(f"GPU, {what}, images/s", rate)
        lines.append(f"- One thread on the GPU, batches of {BATCH_SIZE}, {what}: {rate:,.0f} img/s.")
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        on_cpus = _rate(lambda: pool.map(_decode_files, [paths] * cores, 1), len(paths) * cores)
    _report(f"CPUs, decoding and resizing, {cores} processes, images/s", on_cpus)
    return [*lines, f"- {cores} processes on {cores} cores: {on_cpus:,.0f} img/s.\n"]


def _decode_files(paths: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    for path in paths:
        decode_for_model(path.read_bytes())


def _measure_training(_: Path, __: Path) -> list[str]:
    lines = ["## A training step on a batch in memory\n"]
    for batch_size in (32, BATCH_SIZE):
        forms: dict[str, Callable[[int], float]] = {
            "Eager fp32 in NCHW": _eager_step_rate,
            "Ours, bf16": partial(_step_rate, compiled=False),
            "Ours, compiled": partial(_step_rate, compiled=True),
        }
        for what, measure in forms.items():
            rate = measure(batch_size)
            _report(f"training step: {what}, batches of {batch_size}, images/s", rate)
            lines.append(f"- {what}, batches of {batch_size}: {rate:,.0f} img/s.")
    return lines


def _eager_step_rate(batch_size: int) -> float:
    """Measure a training step as tutorials write it."""
    model = build_resnet50(len(CLASS_NAMES), seed=0).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images_NCHW = torch.zeros((batch_size, 3, 224, 224), device=DEVICE)
    targets_N = torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images_NCHW), targets_N).backward()
        optimizer.step()

    return _rate(step, batch_size)


def _step_rate(batch_size: int, compiled: bool) -> float:
    model = build_resnet50(len(CLASS_NAMES), seed=0).to(memory_format=torch.channels_last).to(DEVICE)
    wrapped = CompiledModel(model, batch_size, lambda _: None) if compiled else model
    return _rate(build_training_step(model, wrapped, Preprocessing(), DEVICE, batch_size), batch_size)


def _rate(call: Callable[[], object], num_images: int) -> float:
    """Measure images per second of a call that processes `num_images`, after three warm-up calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < MIN_RATE_S:
        call()
        torch.cuda.synchronize()
        done += num_images
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
