"""Our ResNet50 against torchvision's, and what training does to it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet50

from catsdogs.checkpoint import list_shapes
from catsdogs.resnet import build_resnet50, freeze_backbone, group_parameters, set_train_mode


@pytest.fixture(scope="module")
def resnet():
    return build_resnet50(num_classes=3, seed=1)


@pytest.fixture
def changed(resnet):
    """A copy to change."""
    return copy.deepcopy(resnet)


def torchvision_resnet50(num_classes, seed):
    torch.manual_seed(seed)
    return resnet50(weights=None, num_classes=num_classes)


def assert_equal_state(first, second):
    assert list(first.state_dict()) == list(second.state_dict())
    for name, tensor in second.state_dict().items():
        assert first.state_dict()[name].equal(tensor), name


def test_initial_weights_equal_torchvisions():
    assert_equal_state(build_resnet50(7, seed=5), torchvision_resnet50(7, seed=5))


@pytest.mark.parametrize("train", [True, False])
def test_logits_and_gradients_equal_torchvisions(train):
    ours, theirs = build_resnet50(7, seed=5).train(train), torchvision_resnet50(7, seed=5).train(train)
    images_NCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (ours, theirs):
        logits.append(model(images_NCHW))
        F.cross_entropy(logits[-1], torch.tensor([1, 4])).backward()
    assert logits[0].equal(logits[1])
    assert logits[0].std() > 0.01
    for (name, ours_parameter), theirs_parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert ours_parameter.grad.equal(theirs_parameter.grad), name
    assert_equal_state(ours, theirs)  # the running statistics


def test_the_table_of_shapes_equals_torchvisions():
    assert list_shapes(7) == {name: tuple(t.shape) for name, t in torchvision_resnet50(7, 0).state_dict().items()}


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone(resnet):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, other = build_resnet50(3, seed=1), build_resnet50(3, seed=2)
    assert torch.rand(3).equal(expected)
    assert_equal_state(again, resnet)
    assert not resnet.fc.weight.equal(other.fc.weight)
    assert not resnet.conv1.weight.equal(other.conv1.weight)


def test_freezing_leaves_only_the_head_trainable(changed):
    freeze_backbone(changed)
    assert [name for name, p in changed.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(("num_rows", "training"), [(2, True), (1, False), (0, False)])
def test_batchnorm_statistics_move_only_for_batches_of_two_or_more(changed, num_rows, training):
    set_train_mode(changed, num_rows)
    assert all(module.training == training for module in changed.modules())
    before = changed.bn1.running_mean.clone()
    changed.bn1(torch.randn(2, 64, 3, 3))
    assert changed.bn1.running_mean.equal(before) != training


def test_norms_and_biases_have_no_weight_decay(resnet):
    decayed, spared = group_parameters(resnet, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in resnet.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        name for name in names.values() if "conv" in name or "downsample.0" in name or name == "fc.weight"
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_parameter_groups_of_a_frozen_model_hold_the_head(changed):
    freeze_backbone(changed)
    assert [len(group["params"]) for group in group_parameters(changed, 0.1)] == [1, 1]
