"""Configure a process that runs a model: device, precision, threads, memory allocator.

Shapes: N batch, C channels, H, W.
"""

import ctypes
import functools
import os
import time
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F

from catsdogs.errors import RunError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIN_BF16_CAPABILITY = (8, 0)  # CUDA compute capability of the first GPUs with bf16 tensor cores
MIN_BF16_SPEEDUP = 1.15  # over fp32; below it, bf16 is not worth its rounding
NUM_PROBE_RUNS = 6
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
MAX_INT32 = 2**31 - 1


def select_device(gpus: Sequence[object]) -> torch.device:
    """Select the GPU that Ray assigned to this process, else the CPU; raises RunError if torch cannot use the GPU."""
    if gpus and not torch.cuda.is_available():
        raise RunError(f"Ray assigned GPU {gpus}, which torch {torch.__version__} cannot use: install torch with CUDA")
    return torch.device("cuda" if gpus else "cpu")


def configure_threads_and_malloc(num_model_processes: int) -> None:
    """Divide this machine's cores among its model processes, and keep freed memory in the process.

    By default glibc returns large blocks to the kernel, which zeroes their pages at the next allocation: 10% of the
    time of scoring and 6% of that of training (measured: 2-core Zen 4, 2026-11).
    """
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, num_cores // max(1, num_model_processes)))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MAX_INT32)


def disable_tf32(precision: str, device: torch.device) -> None:
    """Compute fp32 in full precision on a GPU, whose convolutions use TF32 by default."""
    if precision == "fp32" and device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # defined at run time
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """Resolve `auto` to bf16 if it is faster than fp32 on this device; a CPU is measured once per process, 0.3 s."""
    if precision != "auto":
        return cast(Precision, precision)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= MIN_BF16_CAPABILITY else "fp32"
    return "bf16" if measure_bf16_speedup() >= MIN_BF16_SPEEDUP else "fp32"


@functools.cache
def measure_bf16_speedup() -> float:
    """Measure the speedup of bf16 over fp32 for a convolution from the middle of ResNet50, on one core of this CPU.

    The two alternate, and the fastest run of each counts, because other processes only slow a run down.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [[_run_probe(dtype) for dtype in DTYPES.values()] for _ in range(NUM_PROBE_RUNS)]
    finally:
        torch.set_num_threads(num_threads)
    fp32_s, bf16_s = np.min(seconds, axis=0)
    return float(fp32_s / bf16_s)


@torch.inference_mode()
def _run_probe(dtype: torch.dtype) -> float:
    """Compute a convolution of about 10 ms; return its CPU seconds."""
    images_NCHW = torch.ones((8, 256, 14, 14), dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones((256, 256, 3, 3), dtype=dtype).contiguous(memory_format=torch.channels_last)
    start = time.thread_time()
    F.conv2d(images_NCHW, weight, padding=1)
    return time.thread_time() - start
