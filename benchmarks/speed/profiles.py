"""Where the time goes, of a training step, of decoding and of the start."""

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.contestants import SCORING, sample
from catsdogs import checkpoint
from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing, decode
from catsdogs.model import measure_bf16_speedup
from catsdogs.predict import configure_threads_and_malloc
from catsdogs.train.step import TrainStep, Whole, make_optimizer
from catsdogs.vision import ResNet

BATCH_SIZE = 32
STEPS = 4
NUM_DECODED, NUM_SCORED = 600, 64
CPU = torch.device("cpu")
KINDS = {"convolution": "convolutions", "batch_norm": "BatchNorm", "pool": "pooling"}  # part of an operator's name
LABELLED = "first batch labelled"


def profiles(images: Path, model: Path, work: Path) -> str:
    """Profile each; a section of the page."""
    lines = [_step(model), _decoding(images, work), _start(images, model, work)]
    return "\n".join(["## Where the time goes\n", *(f"- {line}" for line in lines), ""])


def _step(model: Path) -> str:
    """Time steps on a batch in memory, then one by operators."""
    configure_threads_and_malloc(1)
    given = checkpoint.load(str(model))
    trained = given.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = training_step(trained, trained, given.preprocessing, CPU, BATCH_SIZE)
    steps = [_seconds(step) for _ in range(STEPS)]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    by_kind: Counter[str] = Counter()
    for event in found.key_averages():
        kind = next((KINDS[part] for part in KINDS if part in event.key), "everything else")
        by_kind[kind] += event.self_cpu_time_total
    total = by_kind.total()
    shares = ", ".join(f"{kind} {us / total:.0%}" for kind, us in by_kind.most_common())
    return (
        f"A step of training on a batch in memory, bf16: {BATCH_SIZE / min(steps[1:]):.1f} img/s; {shares}. A "
        f"convolution from the middle of the model is {measure_bf16_speedup():.1f} times as fast in bf16 as in fp32."
    )


def training_step(
    model: ResNet,
    wrapped: Callable[[torch.Tensor], torch.Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int,
) -> Callable[[], object]:
    """Make what takes one step of ours in bf16, on a batch in the device's memory."""
    config = TrainConfig(data_dir="", lr=0.001)
    whole = Whole(model, wrapped, preprocessing, device, "bf16")
    train_step = TrainStep(whole, make_optimizer(model, config), config, device, world_size=1)
    size = preprocessing.img_size
    images_NHWC = torch.zeros((batch_size, size, size, 3), dtype=torch.uint8, device=device)
    targets_N = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return partial(train_step.step, images_NHWC, targets_N, 0.001)


def _decoding(images: Path, work: Path) -> str:
    """Time the parts of decoding files that are in memory, on one core."""
    torch.set_num_threads(1)
    folder = sample(images, NUM_DECODED, work / f"decoded-{NUM_DECODED}")
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    decoded = [image for image in (decode(content).image for content in files) if image is not None]
    preprocessing = Preprocessing()
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files]
    jpeg = _us_each(lambda: [torch.ops.image.decode_jpeg(content, 3, True) for content in encoded], len(files))
    decoding = _us_each(lambda: [decode(content) for content in files], len(files))
    view = _us_each(lambda: [preprocessing(image) for image in decoded], len(files))
    return (
        f"An image on one core: {decoding:.0f} us to decode it, of which libjpeg-turbo takes {jpeg:.0f}, and "
        f"{view:.0f} us to resize and crop it."
    )


def _start(images: Path, model: Path, work: Path) -> str:
    """Count the CPU seconds of every process up to the first labelled batch."""
    folder = sample(images, NUM_SCORED, work / f"start-{NUM_SCORED}")
    filled = {"images": folder, "checkpoint": model, "output": work / "start"}
    words = [word.format(**filled) for word in SCORING[0].words]
    began, spent = time.monotonic(), Counter[str]()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(LABELLED):
                seconds = time.monotonic() - began
                parent = psutil.Process(process.pid)
                for one in [parent, *parent.children(recursive=True)]:
                    with suppress(psutil.Error):  # it has ended
                        spent["the command" if one == parent else _name(one.cmdline())] += sum(one.cpu_times()[:2])
    shown = ", ".join(f"{name} {cpu_s:.1f}" for name, cpu_s in spent.most_common())
    return f"The start of `score`, {seconds:.1f} s, in CPU seconds: {shown}; {spent.total():.0f} in all."


def _name(words: Sequence[str]) -> str:
    """Name a process of Ray's: by its title, its script or its program."""
    if words and words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0]
    scripts = [word for word in words if word.endswith(".py")]
    return Path((scripts or words or ["ended"])[0]).name


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _us_each(work: Callable[[], object], count: int) -> float:
    return min(_seconds(work) for _ in range(3)) / count * 1e6
