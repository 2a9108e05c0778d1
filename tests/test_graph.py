"""A training step that is captured once and replayed. Capturing itself needs a GPU: here a stand-in runs the step."""

import pytest
import torch
from torch import nn

from benchmarks.speed.gpu_checks import compare_graph_with_eager
from catsdogs.config import TrainConfig
from catsdogs.train.graph import WARM_UP_STEPS, GraphedStep
from catsdogs.train.loop import train_step
from catsdogs.train.model import build_optimizer, set_learning_rate
from catsdogs.train.worker import Ranks

SIZES = (8, 8, 8, 8, 5, 8, 1, 8, 0, 8)  # of batches; the fourth of 8 is captured


def build_batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn((size, 6), generator=generator), torch.arange(size) % 2) for size in SIZES]


def run_steps(optimizer_name, wrap):
    """Take a step on each batch, with another learning rate each."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    config = TrainConfig(data_dir="d", optimizer=optimizer_name)
    optimizer = build_optimizer(model, config)
    step = wrap(lambda batch: train_step(model, optimizer, batch, config, Ranks()), optimizer)
    losses = []
    for i, batch in enumerate(build_batches()):
        set_learning_rate(optimizer, 0.1 / (i + 1), torch.device("cpu"))
        losses.append(step(batch).clone())
    return torch.stack(losses), model.weight.detach()


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_replays_on_static_batches_are_the_steps_themselves(optimizer_name):
    captured, flags = [], []

    def capture(step, batch):
        static_batch = tuple(torch.full_like(tensor, 0) for tensor in batch)
        captured.append(len(batch[1]))

        def replay(batch):
            for static, tensor in zip(static_batch, batch, strict=True):
                static.copy_(tensor)
            return step(static_batch)

        return replay

    def wrap(step, optimizer):
        def capture_and_record(*given):
            flags.append([group.get("capturable", True) for group in optimizer.param_groups])
            return capture(*given)

        return GraphedStep(step, optimizer, 8, pytest.fail, capture_and_record)

    expected, found = run_steps(optimizer_name, lambda step, _: step), run_steps(optimizer_name, wrap)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert captured == [8]
    assert flags == [[True, True]]


def test_steps_that_cannot_be_captured_run_as_they_are_with_one_line():
    lines, attempts = [], []

    def fail(step, batch):
        attempts.append(batch)
        raise RuntimeError("operation not permitted\nCompile with TORCH_USE_CUDA_DSA")

    expected = run_steps("sgd", lambda step, _: step)
    found = run_steps("sgd", lambda step, optimizer: GraphedStep(step, optimizer, 8, lines.append, fail))
    assert torch.equal(expected[0], found[0])
    assert len(attempts) == 1
    assert lines == ["training without a CUDA graph, which is slower: operation not permitted"]


def test_the_first_full_batches_run_before_the_capture():
    calls = []
    step = GraphedStep(
        lambda batch: calls.append("eager") or batch[1].sum(),
        torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
        8,
        pytest.fail,
        lambda step, batch: lambda batch: calls.append("replay") or batch[1].sum(),
    )
    for batch in build_batches():
        step(batch)
    expected = ["eager"] * (WARM_UP_STEPS + 1) + ["replay"] * 4 + ["eager"] * 2
    assert sorted(calls) == sorted(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_takes_the_steps_themselves():
    config = TrainConfig(data_dir="d", batch_size=16)
    assert compare_graph_with_eager(torch.device("cuda"), config, 8, pytest.fail) < 1e-2
