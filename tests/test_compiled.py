"""A model compiled for training; its speed is measured on GPUs."""

import pytest
import torch
from torch import nn

from catsdogs.config import TrainConfig
from catsdogs.train.model import CompiledModel, should_compile

INPUTS = torch.randn(4, 3)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_compiling_happens_once_and_keeps_outputs_and_gradients(module, monkeypatch):
    messages, calls = [], []
    compile_ = torch.compile

    def compile_without_kernels(given, dynamic):  # which take a minute
        calls.append(dynamic)
        return compile_(given, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    compiled = CompiledModel(module, 4, messages.append)
    for _ in range(2):
        outputs = compiled(INPUTS)
        torch.testing.assert_close(outputs, module(INPUTS))
    outputs.sum().backward()
    assert module.bias.grad is not None
    assert calls == [False]
    assert messages == ["compiling the model, which takes about a minute"]


def test_training_continues_without_a_compiler(module, monkeypatch):
    def failing(given, **_):
        def fail(inputs):
            raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

        return fail

    monkeypatch.setattr(torch, "compile", failing)
    messages = []
    compiled = CompiledModel(module, 4, messages.append)
    for _ in range(2):
        torch.testing.assert_close(compiled(INPUTS), module(INPUTS))
    assert messages[1:] == ["training without torch.compile, which is slower: Failed to find C compiler."]


def test_only_batches_of_the_given_size_are_compiled(module, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda given, **_: lambda inputs: seen.append(len(inputs)) or given(inputs))
    compiled = CompiledModel(module, 4, lambda _: None)
    for num_rows in (3, 4, 1, 4):
        assert compiled(INPUTS[:num_rows]).shape == (num_rows, 2)
    assert seen == [4, 4]


@pytest.mark.parametrize(
    ("device", "num_workers", "batch_size", "finished", "expected"),
    [
        ("cuda", 1, 128, 0, True),
        ("cuda", 1, 64, 0, False),
        ("cuda", 1, 128, 1, False),
        ("cuda", 2, 128, 0, False),
        ("cpu", 1, 128, 0, False),
    ],
)
def test_long_runs_of_large_batches_on_one_gpu_are_compiled(device, num_workers, batch_size, finished, expected):
    config = TrainConfig(data_dir="d", epochs=10, num_workers=num_workers, batch_size=batch_size)
    assert should_compile(config, torch.device(device), 100_000, finished) == expected
