"""Profiles of a training step, of decoding and of start-up."""

import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import simplejpeg
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.contestants import SCORING, copy_sample
from benchmarks.speed.timing import PROGRESS
from catsdogs.checkpoint import read_checkpoint
from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing, decode_image
from catsdogs.process_setup import configure_threads_and_malloc, measure_bf16_speedup
from catsdogs.resnet import ResNet50, build_resnet50
from catsdogs.train.loop import train_step
from catsdogs.train.model import FullModel, build_optimizer, set_learning_rate
from catsdogs.train.worker import Ranks
from catsdogs.weights import load_state_dict_strictly

BATCH_SIZE = 32
STEPS = 4
NUM_DECODED, NUM_SCORED = 600, 64
CPU = torch.device("cpu")
OPERATORS = {"convolution": "convolutions", "batch_norm": "BatchNorm", "pool": "pooling"}  # part of an operator's name


def write_profiles(images: Path, model: Path, work: Path) -> str:
    """Measure each profile, and write the section of the page."""
    lines = [_profile_step(model), _profile_decoding(images, work), _profile_start(images, model, work)]
    return "\n".join(["## Where the time goes\n", *(f"- {line}" for line in lines), ""])


def _profile_step(model_folder: Path) -> str:
    """Time training steps on a batch in memory, then profile one by operator."""
    step = build_cpu_step(str(model_folder))
    steps = [_measure_s(step) for _ in range(STEPS)]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    cpu_us: Counter[str] = Counter()
    for event in found.key_averages():
        name = next((OPERATORS[part] for part in OPERATORS if part in event.key), "everything else")
        cpu_us[name] += round(event.self_cpu_time_total)
    shares = ", ".join(f"{name} {us / cpu_us.total():.0%}" for name, us in cpu_us.most_common())
    return (
        f"A training step on a batch in memory, bf16: {BATCH_SIZE / min(steps[1:]):.1f} img/s; {shares}. A "
        f"convolution from the middle of the model is {measure_bf16_speedup():.1f} times as fast in bf16 as in fp32."
    )


def build_cpu_step(checkpoint: str) -> Callable[[], object]:
    """Build a training step on all cores, of a checkpoint's weights."""
    configure_threads_and_malloc(1)
    files = read_checkpoint(checkpoint)
    model = build_resnet50(len(files.class_names), seed=0).to(memory_format=torch.channels_last)
    load_state_dict_strictly(model, files.load_state_dict(), files.uri)
    return build_training_step(model, model, files.preprocessing, CPU, BATCH_SIZE)


def build_training_step(
    model: ResNet50,
    wrapped: Callable[[torch.Tensor], torch.Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int,
    ranks: Ranks | None = None,
) -> Callable[[], object]:
    """Build a call that runs one training step of ours in bf16, on a batch in the memory of the device."""
    config = TrainConfig(data_dir="", lr=0.001)
    train_model = FullModel(model, wrapped, preprocessing, "bf16")
    optimizer = build_optimizer(model, config)
    size = preprocessing.img_size
    images_NHWC = torch.zeros((batch_size, size, size, 3), dtype=torch.uint8, device=device)
    targets_N = torch.zeros(batch_size, dtype=torch.int64, device=device)
    set_learning_rate(optimizer, config.peak_lr, device)
    return partial(train_step, train_model, optimizer, (images_NHWC, targets_N), config, ranks or Ranks())


def _profile_decoding(images: Path, work: Path) -> str:
    """Time the parts of decoding on one core, from memory."""
    torch.set_num_threads(1)
    folder = copy_sample(images, NUM_DECODED, work / f"decoded-{NUM_DECODED}")
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    images_HWC = [image for image in (decode_image(file).image for file in files) if image is not None]
    preprocessing = Preprocessing()
    jpeg_us = _measure_us(lambda: [simplejpeg.decode_jpeg(file) for file in files], len(files))
    decode_us = _measure_us(lambda: [decode_image(file) for file in files], len(files))
    preprocess_us = _measure_us(lambda: [preprocessing(image) for image in images_HWC], len(files))
    return (
        f"An image on one core: {decode_us:.0f} us to decode, of which `simplejpeg.decode_jpeg` takes "
        f"{jpeg_us:.0f}, and {preprocess_us:.0f} us to resize and crop."
    )


def _profile_start(images: Path, model: Path, work: Path) -> str:
    """Measure the CPU seconds of every process until the first batch is done."""
    folder = copy_sample(images, NUM_SCORED, work / f"start-{NUM_SCORED}")
    command = SCORING[0].format_command(folder, model, work / "start")
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if PROGRESS.match(line))
        seconds = time.monotonic() - start
        cpu_s = _read_cpu_seconds(psutil.Process(process.pid))
        process.stdout.read()
    names = sorted(cpu_s, key=lambda name: -cpu_s[name])
    shown = ", ".join(f"{name} {cpu_s[name]:.1f}" for name in names)
    return f"The start of `score`, {seconds:.1f} s, in CPU seconds: {shown}; {sum(cpu_s.values()):.0f} in all."


def _read_cpu_seconds(driver: psutil.Process) -> dict[str, float]:
    """Read the CPU seconds of a command and of its children, by name."""
    cpu_s: dict[str, float] = defaultdict(float)
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended
            name = "the command" if process == driver else _name_process(process.cmdline())
            times = process.cpu_times()
            cpu_s[name] += times.user + times.system
    return cpu_s


def _name_process(command: Sequence[str]) -> str:
    """Name a process of Ray by its title, its script or its program."""
    if command and command[0].startswith("ray::"):
        return command[0].removeprefix("ray::").split(".")[0]
    scripts = [word for word in command if word.endswith(".py")]
    return Path((scripts or command or ["ended"])[0]).name


def _measure_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measure_us(call: Callable[[], object], count: int) -> float:
    """Measure microseconds per image of a call that processes `count`; the fastest of three calls."""
    return min(_measure_s(call) for _ in range(3)) / count * 1e6
