"""ResNet50 at full width on images of 32 pixels, with BatchNorm statistics as a trained model has them."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from catsdogs import fused as fused_module
from catsdogs import model as model_module
from catsdogs.model import (
    DTYPES,
    NUM_FEATURES,
    backbone_for_inference,
    build,
    freeze_backbone,
    parameter_groups,
    resolve_precision,
    training_mode,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resnet():
    """Make a model whose BatchNorm layers do something."""
    made = build(num_classes=3, seed=1)
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.3, 0.9),
                (module.bias.data, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    return made.eval()


@pytest.fixture(scope="module")
def tried(resnet):
    """A copy to change."""
    return copy.deepcopy(resnet)


@pytest.fixture(scope="module")
def folded(resnet):
    return backbone_for_inference(resnet, "fp32", CPU)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = build(2, seed=7), build(2, seed=7), build(2, seed=8)
    assert torch.rand(3).equal(expected)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not first.fc.weight.equal(other.fc.weight)
    assert not first.conv1.weight.equal(other.conv1.weight)
    assert first.fc.weight.shape == (2, 2048)


def test_freezing_leaves_the_head_alone_to_train(tried):
    tried.requires_grad_(True)
    freeze_backbone(tried)
    assert [name for name, p in tried.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(("num_rows", "training"), [(2, True), (1, False), (0, False)])
def test_statistics_move_only_where_they_can_be_learned(tried, num_rows, training):
    training_mode(tried, num_rows)
    assert tried.training == training
    assert all(module.training == training for module in tried.modules())
    before = tried.bn1.running_mean.clone()
    tried.bn1(torch.randn(2, 64, 3, 3))
    assert tried.bn1.running_mean.equal(before) != training


def test_norms_and_biases_do_not_decay(resnet):
    decayed, spared = parameter_groups(resnet, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in resnet.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        name for name in names.values() if "conv" in name or "downsample.0" in name or name == "fc.weight"
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_parameter_groups_of_a_frozen_model_are_the_head(tried):
    freeze_backbone(tried)
    groups = parameter_groups(tried, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_the_inference_form_gives_the_same_logits(resnet, folded, images):
    with torch.inference_mode():
        expected = resnet(images)
        features = folded(images.contiguous(memory_format=torch.channels_last))
        found = resnet.fc(features)
    assert features.shape == (2, NUM_FEATURES)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_inference_form_in_bf16_is_near(resnet, images):
    folded = backbone_for_inference(resnet, "bf16", CPU)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        expected = resnet(images)
        found = resnet.fc(folded(images.bfloat16().contiguous(memory_format=torch.channels_last)).float())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_inference_form_is_a_copy_without_norms(resnet):
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    folded = backbone_for_inference(resnet, "fp32", CPU)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [p for p in folded.parameters() if p.requires_grad]
    assert folded.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(resnet.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in resnet.parameters())


def test_a_model_in_training_mode_is_folded_as_for_evaluation(resnet, folded):
    resnet.train()
    again = backbone_for_inference(resnet, "fp32", CPU)
    assert resnet.training
    resnet.eval()
    assert not again.training
    assert all(a.equal(b) for a, b in zip(again.parameters(), folded.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_given_precision_is_kept(precision):
    assert resolve_precision(precision, CPU) == precision


@pytest.mark.parametrize(("fp32_s", "bf16_s", "expected"), [(3.0, 1.0, "bf16"), (1.1, 1.0, "fp32"), (1.0, 4.0, "fp32")])
def test_auto_precision_follows_what_was_measured(monkeypatch, fp32_s, bf16_s, expected):
    slow = iter([True] + [False] * 100)

    class Probe:
        def __init__(self, dtype):
            self.seconds = bf16_s if dtype == torch.bfloat16 else fp32_s

        def run_s(self):
            return self.seconds * (100 if next(slow) else 1)

    monkeypatch.setattr(model_module, "_Probe", Probe)
    model_module.measure_bf16_speedup.cache_clear()
    assert resolve_precision("auto", CPU) == expected
    model_module.measure_bf16_speedup.cache_clear()


def test_the_probe_measures_this_machine():
    threads = torch.get_num_threads()
    model_module.measure_bf16_speedup.cache_clear()
    assert 0.05 < model_module.measure_bf16_speedup() < 20
    assert torch.get_num_threads() == threads


def test_the_probe_does_not_count_what_others_do_on_its_core():
    probe = model_module._Probe(torch.float32)
    probe._conv = lambda _: time.sleep(0.5)
    assert probe.run_s() < 0.25


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_follows_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_the_fused_form_gives_the_plain_layers_features(resnet, images, precision, share):
    assert fused_module._works(DTYPES[precision], CPU) or precision == "bf16"  # which few CPUs have
    plain = backbone_for_inference(resnet, precision, CPU)
    inputs = images.to(DTYPES[precision], memory_format=torch.channels_last)
    with torch.inference_mode():
        expected, found = plain(inputs), fused_module.fused(plain)(inputs)
        again = fused_module.fused(plain)(inputs)
    assert found.shape == (2, NUM_FEATURES)
    assert (found - expected).abs().max() <= share * expected.abs().max()
    assert torch.equal(found, again)  # the inputs are as they were


def test_without_the_operators_the_plain_layers_stay(folded, monkeypatch):
    monkeypatch.setattr(fused_module, "_works", lambda *_: False)
    assert fused_module.fused(folded) is folded


def test_operators_that_are_missing_or_wrong_do_not_work(monkeypatch):
    def absent(*_):
        raise NotImplementedError("no such operator")

    for broken in (absent, lambda inputs, *_: inputs):
        fused_module._works.cache_clear()
        monkeypatch.setattr(fused_module._Conv, "forward", lambda self, inputs, broken=broken: broken(inputs))
        assert not fused_module._works(torch.float32, CPU)
    fused_module._works.cache_clear()


def test_the_form_for_gpus_gives_the_plain_layers_features(resnet, images, monkeypatch):
    def rectified(inputs, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(inputs, weight, bias, stride, padding, dilation, groups).relu()

    def added(inputs, weight, sums, alpha, bias, stride, padding, dilation, groups):
        return (F.conv2d(inputs, weight, bias, stride, padding, dilation, groups) + alpha * sums).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", rectified)  # a CPU has neither
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", added)
    monkeypatch.setitem(fused_module.CONVS, "cpu", fused_module._CudnnConv)
    fused_module._works.cache_clear()
    plain = backbone_for_inference(resnet, "fp32", CPU)
    with torch.inference_mode():
        expected, found = plain(images), fused_module.fused(plain)(images)
    fused_module._works.cache_clear()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_gpu_fuses_no_fp32_which_would_be_tf32():
    assert not fused_module._works(torch.float32, torch.device("cuda"))
