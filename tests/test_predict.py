"""The hand-made model's logits grow with an image's blue and red, so its answers are known beforehand."""

import copy
import io
import platform
import resource

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CLASSES, red_or_blue
from PIL import Image

from catsdogs import checkpoint, predict
from catsdogs.errors import RunError
from catsdogs.predict import (
    Predictor,
    build_checked_predictor,
    build_predictions,
    configure_threads_and_malloc,
    select_device,
    true_labels,
)
from catsdogs.schema import PREDICTIONS, WITH_EMBEDDINGS

CPU = torch.device("cpu")
MIB = 2**20
SOME_MIB = 100  # of the largest values between two layers


@pytest.fixture(scope="module")
def model(red_blue_checkpoint):
    return checkpoint.load(str(red_blue_checkpoint))


@pytest.fixture(scope="module")
def images(model):
    """20 blue images, then 20 red ones."""
    drawn = [np.asarray(Image.open(io.BytesIO(red_or_blue(label, i)))) for label in CLASSES for i in range(20)]
    return np.stack([model.preprocessing(image) for image in drawn])


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model.model, model.preprocessing, "fp32", CPU)


def decoded(statuses: list[str], folders: list[str] | None = None) -> pa.Table:
    """Make rows as the decoding stage gives them."""
    folders = folders or ["red"] * len(statuses)
    ok = [status == "ok" for status in statuses]
    return pa.table(
        {
            "path": [f"s3://b/{folder}/{i}.jpg" for i, folder in enumerate(folders)],
            "size_bytes": pa.array([10 + i for i in range(len(statuses))], pa.int64()),
            "status": statuses,
            "error": pa.array([None if good else "why" for good in ok], pa.string()),
            "width": pa.array([40 if good else None for good in ok], pa.int32()),
            "height": pa.array([36 if good else None for good in ok], pa.int32()),
            "image": [b""] * len(statuses),
        }
    )


PROBS_NK = np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]], dtype=np.float32)


def test_hand_made_model_tells_red_from_blue(predictor, images):
    assert predictor(images).argmax(axis=1).tolist() == [0] * 20 + [1] * 20


def test_probabilities_are_float32_and_sum_to_one(predictor, images):
    probs_NK = predictor(images[:5])
    assert (probs_NK.shape, probs_NK.dtype) == ((5, 2), np.float32)
    np.testing.assert_allclose(probs_NK.sum(axis=1), 1, atol=1e-6)


def test_probabilities_are_those_of_the_plain_model(model, predictor, images):
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    inputs_NCHW = (torch.tensor(images[15:25]).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        expected = model.model(inputs_NCHW).softmax(dim=1).numpy()
    np.testing.assert_allclose(predictor(images[15:25]), expected, atol=1e-5)


@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_the_cores_share_a_batch_and_its_rows_stay_in_order(model, predictor, images, num_images):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = Predictor(model.model, model.preprocessing, "fp32", CPU)
        torch.set_num_threads(2)
        shared = Predictor(model.model, model.preprocessing, "fp32", CPU)
    finally:
        torch.set_num_threads(threads)
    batch_NHWC = images[::8][:num_images]  # blue ones, then red ones

    np.testing.assert_allclose(shared(batch_NHWC), alone(batch_NHWC), atol=1e-6)
    assert torch.get_num_threads() == threads


def test_read_only_images_are_fine_and_stay_as_they_are(predictor, images):
    given = images[18:22].copy()
    given.flags.writeable = False
    before = given.copy()
    predictor(given)
    assert (given == before).all()


def test_bf16_agrees_on_the_labels(model, predictor, images):
    bf16 = Predictor(model.model, model.preprocessing, "bf16", CPU)
    assert bf16.precision == "bf16"
    found = bf16(images[10:30])
    assert found.dtype == np.float32
    assert (found.argmax(axis=1) == predictor(images[10:30]).argmax(axis=1)).all()


def test_bf16_that_agrees_is_what_labels(model):
    found, device_precision = build_checked_predictor(model.model, model.preprocessing, "bf16", CPU)
    assert (found.precision, device_precision) == ("bf16", "cpu, bf16")


@pytest.fixture
def sharp_model(model, predictor):
    """A model for which one picture of the check lies where less than bf16 can tell apart turns the label."""
    sharp = copy.deepcopy(model.model)
    features_D = torch.tensor(predictor.embed(predict._draw_check_images(model.preprocessing.img_size)))[4]
    sharp.fc.weight.data *= 100
    sharp.fc.bias.data = -sharp.fc.weight.data @ features_D
    return sharp


def test_auto_falls_back_to_fp32_where_bf16_disagrees_and_says_so(model, sharp_model, images, monkeypatch):
    monkeypatch.setattr(predict, "resolve_precision", lambda *_: "bf16")
    found, device_precision = build_checked_predictor(sharp_model, model.preprocessing, "auto", CPU)
    assert found.precision == "fp32"
    assert device_precision.startswith("cpu, fp32: probabilities in bf16 differ by ")
    exact = Predictor(sharp_model, model.preprocessing, "fp32", CPU)
    assert (found(images[15:25]) == exact(images[15:25])).all()


def test_bf16_that_was_asked_for_stays_and_says_that_it_disagrees(model, sharp_model):
    found, device_precision = build_checked_predictor(sharp_model, model.preprocessing, "bf16", CPU)
    assert found.precision == "bf16"
    assert device_precision.startswith("cpu, bf16, its probabilities differ by ")


def test_a_model_that_gives_no_numbers_is_told_apart(model, monkeypatch):
    broken = copy.deepcopy(model.model)
    broken.fc.bias.data[0] = torch.nan
    monkeypatch.setattr(predict, "resolve_precision", lambda *_: "bf16")
    found, device_precision = build_checked_predictor(broken, model.preprocessing, "auto", CPU)
    assert found.precision == "fp32"
    assert "differ by nan" in device_precision


def test_features_are_what_the_plain_models_head_sees(model, predictor, images):
    seen = []
    hook = model.model.fc.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    with torch.inference_mode():
        model.model((torch.tensor(images[18:22]).permute(0, 3, 1, 2) / 255 - mean) / std)
    hook.remove()
    features_ND = predictor.embed(images[18:22])
    assert (features_ND.shape, features_ND.dtype) == ((4, 2048), np.float32)
    np.testing.assert_allclose(features_ND, seen[0].numpy(), atol=1e-4)
    assert (predictor.label(features_ND) == predictor(images[18:22])).all()


def test_embeddings_become_a_column_null_where_there_is_no_label():
    features_ND = np.arange(6, dtype=np.float32).reshape(2, 3)
    table = build_predictions(decoded(["ok", "truncated"]), PROBS_NK[:2], CLASSES, features_ND)
    assert table.schema.equals(WITH_EMBEDDINGS)
    assert table["embedding"].to_pylist() == [[0, 1, 2], None]


def test_predictions_have_the_outputs_schema_and_rows():
    table = build_predictions(decoded(["ok", "ok", "ok"], ["red", "blue", "green"]), PROBS_NK, CLASSES)
    assert table.schema.equals(PREDICTIONS)
    assert table.to_pylist()[2] == {
        "path": "s3://b/green/2.jpg",
        "status": "ok",
        "label": "red",
        "index": 1,
        "prob": 0.875,
        "probs": [0.125, 0.875],
        "error": None,
        "width": 40,
        "height": 36,
        "size_bytes": 12,
        "true_label": None,
    }
    assert table["label"].to_pylist() == ["blue", "blue", "red"]
    assert table["true_label"].to_pylist() == ["red", "blue", None]


@pytest.mark.parametrize("statuses", [["truncated", "ok", "not_found"], ["empty", "empty", "empty"]])
def test_rows_that_failed_have_nulls_for_what_the_model_says(statuses):
    rows = build_predictions(decoded(statuses), PROBS_NK, CLASSES).to_pylist()
    for row, status in zip(rows, statuses, strict=True):
        assert row["status"] == status
        assert row["true_label"] == "red"
        for name in ("label", "index", "prob", "probs", "width", "height"):
            assert (row[name] is None) == (status != "ok"), name
        assert (row["error"] is None) == (status == "ok")
    assert [row["size_bytes"] for row in rows] == [10, 11, 12]


def test_sliced_and_chunked_rows_give_the_same():
    rows = decoded(["ok", "truncated", "ok"])
    chunked = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    longer = decoded(["empty", "ok", "truncated", "ok"])
    assert build_predictions(chunked, PROBS_NK, CLASSES).equals(build_predictions(rows, PROBS_NK, CLASSES))
    sliced = build_predictions(longer.slice(1), PROBS_NK, CLASSES)
    assert sliced["probs"].to_pylist() == build_predictions(rows, PROBS_NK, CLASSES)["probs"].to_pylist()


def test_no_rows_give_an_empty_table_of_the_schema():
    table = build_predictions(decoded([]), np.zeros((0, 2), np.float32), CLASSES)
    assert table.schema.equals(PREDICTIONS)
    assert table.num_rows == 0


def test_a_known_class_index_goes_before_the_folders_name():
    rows = decoded(["ok", "ok"], ["red", "deep"]).append_column("true_index", pa.array([0, 1], pa.int32()))
    assert true_labels(rows, CLASSES).to_pylist() == ["blue", "red"]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/data/red/1.jpg", "red"),
        ("s3://red/blue/1.jpg", "blue"),
        ("/data/red/sub/1.jpg", None),
        ("/data/Red/1.jpg", None),
        ("file:///data/red/%FF.jpg", "red"),
        ("1.jpg", None),
    ],
)
def test_the_parent_folder_is_the_true_label_where_it_is_a_class(path, label):
    assert true_labels(pa.table({"path": [path]}), CLASSES).to_pylist() == [label]


def test_threads_are_shared_and_never_none():
    before = torch.get_num_threads()
    try:
        configure_threads_and_malloc(10_000)
        assert torch.get_num_threads() == 1
        configure_threads_and_malloc(1)
        assert torch.get_num_threads() >= 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_memory_that_a_layer_frees_is_kept_for_the_next_one():
    configure_threads_and_malloc(1)
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(SOME_MIB * MIB // 4)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[4:]) * resource.getpagesize() < SOME_MIB * MIB / 4


def test_a_gpu_that_torch_cannot_use_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device([]) == torch.device("cpu")
    with pytest.raises(RunError, match=r"Ray counts GPU \[0\], which torch .* cannot use: install torch with CUDA"):
        select_device([0])
