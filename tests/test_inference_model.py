"""The inference form against the training model, at full width on images of 32 pixels."""

import pytest
import torch
import torch.nn.functional as F
from models import randomize_batchnorm

from catsdogs.checkpoint import NUM_FEATURES
from catsdogs.inference_model import (
    FUSED_CONVS,
    PLAIN_CONV_VARIABLE,
    FusedGpuConv,
    InferenceBackbone,
    PlainConv,
    passes_trial,
    select_conv_type,
)
from catsdogs.process_setup import DTYPES
from catsdogs.resnet import build_resnet50

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resnet():
    """Make a model whose BatchNorm layers change their inputs, as a trained model's do."""
    return randomize_batchnorm(build_resnet50(num_classes=3, seed=1)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def compute_features(resnet, images, precision, plain):
    backbone = InferenceBackbone(resnet.state_dict(), precision, CPU, plain)
    return backbone(images.to(DTYPES[precision], memory_format=torch.channels_last))


@pytest.mark.parametrize("plain", [True, False])
def test_logits_equal_those_of_the_training_model(resnet, images, plain):
    features_ND = compute_features(resnet, images, "fp32", plain)
    with torch.inference_mode():
        expected, found = resnet(images), resnet.fc(features_ND)
    assert features_ND.shape == (2, NUM_FEATURES)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plain", [True, False])
def test_logits_in_bf16_are_near(resnet, images, plain):
    features_ND = compute_features(resnet, images, "bf16", plain)
    assert features_ND.dtype == torch.bfloat16
    with torch.inference_mode():
        expected, found = resnet(images), resnet.fc(features_ND.float())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_state_dict_is_copied(resnet, images):
    state = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    backbone = InferenceBackbone(state, "fp32", CPU)
    with torch.inference_mode():
        before = backbone(images)
        for tensor in state.values():
            tensor.zero_()
        assert backbone(images).equal(before)


# Fused operators


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_fused_and_plain_operators_give_the_same_features(resnet, images, precision, tolerance):
    fused = passes_trial(FUSED_CONVS["cpu"], DTYPES[precision], CPU)
    assert fused or precision == "bf16"  # which few CPUs compute
    expected = compute_features(resnet, images, precision, plain=True)
    backbone = InferenceBackbone(resnet.state_dict(), precision, CPU)
    inputs = images.to(DTYPES[precision], memory_format=torch.channels_last)
    with torch.inference_mode():
        found, again = backbone(inputs), backbone(inputs)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert found.equal(again)  # the inputs were not overwritten


def test_an_environment_variable_selects_plain_operators(monkeypatch):
    assert select_conv_type(torch.float32, CPU) is FUSED_CONVS["cpu"]
    monkeypatch.setenv(PLAIN_CONV_VARIABLE, "1")
    assert select_conv_type(torch.float32, CPU) is PlainConv


class MissingConv(PlainConv):
    def relu(self, inputs_NCHW):
        raise AttributeError("no such operator")


class WrongConv(PlainConv):
    def relu(self, inputs_NCHW):
        return self(inputs_NCHW)


class NanConv(PlainConv):
    def add_relu(self, inputs_NCHW, residual_NCHW):
        return self(inputs_NCHW) * torch.nan


@pytest.mark.parametrize("broken", [MissingConv, WrongConv, NanConv])
def test_missing_or_wrong_operators_are_replaced_by_plain_ones_and_logged_once(
    resnet, images, broken, monkeypatch, caplog
):
    expected = compute_features(resnet, images, "fp32", plain=True)
    monkeypatch.setitem(FUSED_CONVS, "cpu", broken)
    assert compute_features(resnet, images, "fp32", plain=False).equal(expected)
    compute_features(resnet, images, "fp32", plain=False)
    assert [f"{broken.__name__} does not work" in record.message for record in caplog.records] == [True]


def test_operators_for_gpus_give_the_same_features(resnet, images, monkeypatch):
    def conv_relu(inputs, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(inputs, weight, bias, stride, padding, dilation, groups).relu()

    def conv_add_relu(inputs, weight, residual, alpha, bias, stride, padding, dilation, groups):
        return (F.conv2d(inputs, weight, bias, stride, padding, dilation, groups) + alpha * residual).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)  # a CPU has neither
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setitem(FUSED_CONVS, "cpu", FusedGpuConv)
    assert select_conv_type(torch.float32, CPU) is FusedGpuConv
    expected = compute_features(resnet, images, "fp32", plain=True)
    found = compute_features(resnet, images, "fp32", plain=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_operators_work_on_this_gpu():
    assert select_conv_type(torch.bfloat16, torch.device("cuda")) is FusedGpuConv


def test_fp32_on_a_gpu_uses_plain_operators_because_fused_ones_compute_in_tf32():
    assert select_conv_type(torch.float32, torch.device("cuda")) is PlainConv


def test_other_devices_use_plain_operators():
    assert select_conv_type(torch.float32, torch.device("meta")) is PlainConv


def test_torch_has_no_documented_fused_convolution():
    """When this fails, use the new operator and delete FusedCpuConv, FusedGpuConv and their trial."""
    names = [*dir(F), *dir(torch.nn)]
    assert not [name for name in names if "conv" in name.lower() and "relu" in name.lower()]
