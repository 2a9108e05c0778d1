"""The hand-made model's logits grow with an image's blue and red, so that its predictions are known beforehand."""

import io

import numpy as np
import pytest
import torch
from conftest import CLASSES, red_or_blue
from PIL import Image

from catsdogs import predict
from catsdogs.checkpoint import read_checkpoint
from catsdogs.errors import InputError
from catsdogs.predict import Predictor, build_checked_predictor, draw_check_images
from catsdogs.resnet import build_resnet50
from catsdogs.weights import load_state_dict_strictly

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(red_blue_checkpoint):
    return read_checkpoint(str(red_blue_checkpoint))


@pytest.fixture(scope="module")
def state(checkpoint):
    return checkpoint.load_state_dict()


@pytest.fixture(scope="module")
def resnet(state):
    model = build_resnet50(len(CLASSES), seed=0)
    load_state_dict_strictly(model, state, "the checkpoint")
    return model.eval()


@pytest.fixture(scope="module")
def images(checkpoint):
    """20 blue images, then 20 red ones."""
    drawn = [np.asarray(Image.open(io.BytesIO(red_or_blue(label, i)))) for label in CLASSES for i in range(20)]
    return np.stack([checkpoint.preprocessing(image) for image in drawn])


@pytest.fixture(scope="module")
def predictor(state, checkpoint):
    return Predictor(state, checkpoint.preprocessing, "fp32", CPU)


def test_the_hand_made_model_classifies_red_and_blue(predictor, images):
    assert predictor(images).argmax(axis=1).tolist() == [0] * 20 + [1] * 20


def test_probabilities_are_float32_and_sum_to_one(predictor, images):
    probs_NK = predictor(images[:5])
    assert (probs_NK.shape, probs_NK.dtype) == ((5, 2), np.float32)
    np.testing.assert_allclose(probs_NK.sum(axis=1), 1, atol=1e-6)


def normalize(images, preprocessing):
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std


def test_probabilities_equal_those_of_the_training_model(checkpoint, resnet, predictor, images):
    with torch.inference_mode():
        expected = resnet(normalize(images[15:25], checkpoint.preprocessing)).softmax(dim=1).numpy()
    np.testing.assert_allclose(predictor(images[15:25]), expected, atol=1e-5)


def test_the_mean_of_an_activation_map_and_the_bias_are_the_logit(checkpoint, resnet, predictor, images):
    both_NHWC = np.concatenate([images[15:25]] * 4, axis=2)  # four images wide: maps of several places
    maps_NHW = predictor.map_activations(both_NHWC)
    with torch.inference_mode():
        logits_NK = resnet(normalize(both_NHWC, checkpoint.preprocessing))
    assert maps_NHW.shape[2] >= 4
    expected_N = logits_NK.max(dim=1).values - resnet.fc.bias.detach()[logits_NK.argmax(dim=1)]
    np.testing.assert_allclose(maps_NHW.mean(axis=(1, 2)), expected_N.numpy(), atol=1e-4)


def test_an_activation_map_shows_where_the_predicted_class_is(predictor, images):
    blue, red = images[0], images[20]
    (map_HW,) = predictor.map_activations(np.concatenate([blue] * 6 + [red] * 4, axis=1)[None])
    assert map_HW[:, :6].min() > 2 * map_HW[:, -3:].max()


@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_threads_share_a_batch_and_its_rows_stay_in_order(state, checkpoint, predictor, images, num_images):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = Predictor(state, checkpoint.preprocessing, "fp32", CPU)
        torch.set_num_threads(2)
        shared = Predictor(state, checkpoint.preprocessing, "fp32", CPU)
    finally:
        torch.set_num_threads(threads)
    batch_NHWC = images[::8][:num_images]  # blue ones, then red ones

    np.testing.assert_allclose(shared(batch_NHWC), single(batch_NHWC), atol=1e-6)
    assert torch.get_num_threads() == threads


def test_read_only_images_are_not_changed(predictor, images):
    given = images[18:22].copy()
    given.flags.writeable = False
    before = given.copy()
    predictor(given)
    assert (given == before).all()


def test_bf16_predicts_the_same_classes(state, checkpoint, predictor, images):
    bf16 = Predictor(state, checkpoint.preprocessing, "bf16", CPU)
    assert bf16.precision == "bf16"
    found = bf16(images[10:30])
    assert found.dtype == np.float32
    assert (found.argmax(axis=1) == predictor(images[10:30]).argmax(axis=1)).all()


def test_bf16_is_used_where_it_agrees_with_fp32(state, checkpoint):
    found, device_precision = build_checked_predictor(state, checkpoint.preprocessing, "bf16", CPU)
    assert (found.precision, device_precision) == ("bf16", "cpu, bf16")


@pytest.fixture
def sharp_state(state, checkpoint, predictor):
    """Weights for which the rounding of bf16 changes the class of one check image."""
    features_D = torch.tensor(predictor.embed(draw_check_images(checkpoint.preprocessing.img_size)))[4]
    weight = state["fc.weight"] * 100
    return state | {"fc.weight": weight, "fc.bias": -weight @ features_D}


def test_auto_falls_back_to_fp32_where_bf16_disagrees(checkpoint, sharp_state, images, monkeypatch):
    monkeypatch.setattr(predict, "resolve_precision", lambda *_: "bf16")
    found, device_precision = build_checked_predictor(sharp_state, checkpoint.preprocessing, "auto", CPU)
    assert found.precision == "fp32"
    assert device_precision.startswith("cpu, fp32: probabilities in bf16 differ by ")
    exact = Predictor(sharp_state, checkpoint.preprocessing, "fp32", CPU)
    assert (found(images[15:25]) == exact(images[15:25])).all()


def test_a_chosen_bf16_that_disagrees_is_kept_and_described(checkpoint, sharp_state):
    found, device_precision = build_checked_predictor(sharp_state, checkpoint.preprocessing, "bf16", CPU)
    assert found.precision == "bf16"
    assert device_precision.startswith("cpu, bf16, its probabilities differ by ")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_a_model_that_computes_nan_is_refused_in_every_precision(state, checkpoint, precision):
    overflowing = state | {"fc.weight": torch.full_like(state["fc.weight"], 3e38)}
    with pytest.raises(InputError, match="the model computes NaN in fp32: its training diverged"):
        build_checked_predictor(overflowing, checkpoint.preprocessing, precision, CPU)


def test_features_are_the_inputs_of_the_training_models_head(checkpoint, resnet, predictor, images):
    seen = []
    hook = resnet.fc.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.inference_mode():
        resnet(normalize(images[18:22], checkpoint.preprocessing))
    hook.remove()
    features_ND = predictor.embed(images[18:22])
    assert (features_ND.shape, features_ND.dtype) == ((4, 2048), np.float32)
    np.testing.assert_allclose(features_ND, seen[0].numpy(), atol=1e-4)
    probs_NK, with_probs_ND = predictor.predict(images[18:22], with_features=True)
    assert (with_probs_ND == features_ND).all()
    assert (probs_NK == predictor(images[18:22])).all()
