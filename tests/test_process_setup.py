"""Device, precision, threads and memory allocator of a process that runs a model."""

import platform
import resource
import time

import pytest
import torch

from catsdogs import process_setup
from catsdogs.errors import RunError
from catsdogs.process_setup import (
    configure_threads_and_malloc,
    measure_bf16_speedup,
    resolve_precision,
    select_device,
)

CPU = torch.device("cpu")
MIB = 2**20
BLOCK_MIB = 100  # of the largest tensors between two layers


def test_processes_divide_the_cores_and_each_has_a_thread():
    before = torch.get_num_threads()
    try:
        configure_threads_and_malloc(10_000)
        assert torch.get_num_threads() == 1
        configure_threads_and_malloc(1)
        assert torch.get_num_threads() >= 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_stays_in_the_process():
    configure_threads_and_malloc(1)
    faults = []
    for _ in range(16):  # the heap grows during the first few
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(BLOCK_MIB * MIB // 4)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-4:]) * resource.getpagesize() < BLOCK_MIB * MIB / 4


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device([]) == CPU
    with pytest.raises(RunError, match=r"Ray assigned GPU \[0\], which torch .* cannot use: install torch with CUDA"):
        select_device([0])


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_a_chosen_precision_is_kept(chosen):
    assert resolve_precision(chosen, CPU) == chosen


@pytest.mark.parametrize(("speedup", "expected"), [(3.0, "bf16"), (1.1, "fp32"), (0.25, "fp32")])
def test_auto_on_a_cpu_follows_the_measured_speedup(monkeypatch, speedup, expected):
    monkeypatch.setattr(process_setup, "measure_bf16_speedup", lambda: speedup)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu_follows_its_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_the_speedup_is_measured_on_one_thread_and_the_thread_count_restored():
    threads = torch.get_num_threads()
    measure_bf16_speedup.cache_clear()
    assert 0.05 < measure_bf16_speedup() < 20
    assert torch.get_num_threads() == threads


def replace_convolution(monkeypatch, compute):
    """Measure the speedup with a function of the dtype in place of the convolution."""
    monkeypatch.setattr(process_setup.F, "conv2d", lambda images, *_, **__: compute(images.dtype))
    measure_bf16_speedup.cache_clear()
    speedup = measure_bf16_speedup()
    measure_bf16_speedup.cache_clear()
    return speedup


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_the_fastest_run_counts(monkeypatch):
    seconds = iter([0.01, 0.2] + [0.01] * 100)
    assert 0.5 < replace_convolution(monkeypatch, lambda _: spin(next(seconds))) < 2


def test_time_in_which_the_thread_does_not_run_is_not_counted(monkeypatch):
    def compute(dtype):
        spin(0.01)
        time.sleep(0.05 if dtype == torch.bfloat16 else 0)

    assert 0.5 < replace_convolution(monkeypatch, compute) < 2
