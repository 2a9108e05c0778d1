"""The form of torch's compiler for training; what it makes of a model is measured on GPUs."""

import dataclasses

import pytest
import torch
from torch import nn

from catsdogs.images import Preprocessing
from catsdogs.model import build
from catsdogs.train.compiled import Compiled
from catsdogs.train.step import Whole

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
    compiled = Compiled(module, told.append)
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
    compiled = Compiled(module, told.append)
    for _ in range(2):
        torch.testing.assert_close(compiled(INPUTS), module(INPUTS))
    assert told[1:] == ["training goes on without torch's compiler, more slowly: Failed to find C compiler."]


def test_full_batches_alone_take_it():
    model = build(num_classes=2, seed=0)
    plain = Whole(model, model, Preprocessing(img_size=32), torch.device("cpu"), "fp32", batch_size=2)
    seen = []
    whole = dataclasses.replace(plain, of_full_batches=lambda inputs: seen.append(len(inputs)) or model(inputs))
    for num_rows in (2, 1, 3, 2):
        images_NHWC = torch.zeros((num_rows, 32, 32, 3), dtype=torch.uint8)
        assert whole(images_NHWC, num_rows).shape == (num_rows, 2)
        plain(images_NHWC, num_rows)
    assert seen == [2, 2]
