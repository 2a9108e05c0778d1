"""The form of torch's compiler for training; what it makes of a model is measured on GPUs."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from torch import nn

from catsdogs.config import TrainConfig
from catsdogs.train import worker as worker_module
from catsdogs.train.compiled import CompiledModel

INPUTS = torch.randn(4, 3)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_the_real_compiler_is_asked_once_and_gives_the_same(module, monkeypatch):
    told, asked = [], []
    compile_ = torch.compile

    def eagerly(given, mode, dynamic):
        asked.append((mode, dynamic))
        return compile_(given, backend="eager", dynamic=dynamic)  # all of it but the kernels, which take a minute

    monkeypatch.setattr(torch, "compile", eagerly)
    compiled = CompiledModel(module, 4, told.append)
    for _ in range(2):
        outputs = compiled(INPUTS)
        torch.testing.assert_close(outputs, module(INPUTS))
    outputs.sum().backward()
    assert module.bias.grad is not None
    assert asked == [("reduce-overhead", False)]
    assert told == ["compiling the model, which takes about a minute"]


def test_without_a_compiler_training_goes_on(module, monkeypatch):
    def failing(given, **_):
        def fail(inputs):
            raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

        return fail

    monkeypatch.setattr(torch, "compile", failing)
    told = []
    compiled = CompiledModel(module, 4, told.append)
    for _ in range(2):
        torch.testing.assert_close(compiled(INPUTS), module(INPUTS))
    assert told[1:] == ["training goes on without torch's compiler, more slowly: Failed to find C compiler."]


def test_batches_of_the_given_size_alone_take_it(module, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda given, **_: lambda inputs: seen.append(len(inputs)) or given(inputs))
    compiled = CompiledModel(module, 4, lambda _: None)
    for num_rows in (3, 4, 1, 4):
        assert compiled(INPUTS[:num_rows]).shape == (num_rows, 2)
    assert seen == [4, 4]


@pytest.mark.parametrize(
    ("device", "num_workers", "epochs", "finished", "expected"),
    [("cuda", 1, 2000, 0, True), ("cuda", 1, 2000, 1, False), ("cuda", 2, 2000, 0, False), ("cpu", 1, 2000, 0, False)],
)
def test_long_runs_of_one_worker_on_a_gpu_are_compiled(monkeypatch, device, num_workers, epochs, finished, expected):
    monkeypatch.setattr(worker_module.ray, "get", lambda _: pa.table({"path": ["a"] * 70}))
    monkeypatch.setattr(worker_module.ray.train.torch, "prepare_model", lambda model, **_: model)
    config = TrainConfig(data_dir="d", epochs=epochs, num_workers=num_workers, batch_size=32)  # 2 full steps an epoch
    spec = SimpleNamespace(config=config, folder=SimpleNamespace(preprocessing=None), train_files=None)
    history = SimpleNamespace(epoch=finished)
    trained = worker_module._what_trains(spec, nn.Linear(3, 2), torch.device(device), "bf16", history)
    assert isinstance(trained.wrapped, CompiledModel) == expected
