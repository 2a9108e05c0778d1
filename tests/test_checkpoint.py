"""Checkpoints are written to disk, and read back by us and by timm."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from models import randomize_batchnorm
from safetensors.torch import load_file, save_file

from catsdogs import storage
from catsdogs.checkpoint import (
    CONFIG,
    WEIGHTS,
    parse_safetensors,
    read_checkpoint,
    serialize_config,
    write_checkpoint,
)
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.resnet import build_resnet50

CLASSES = ("cats", "dogs", "żaby 50%")
PREPROCESSING = Preprocessing(img_size=96, crop_pct=0.875, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def resnet():
    return randomize_batchnorm(build_resnet50(len(CLASSES), seed=3)).eval()


@pytest.fixture(scope="module")
def folder(resnet, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint") / "best"
    write_checkpoint(str(made), resnet.state_dict(), CLASSES, PREPROCESSING)
    return made


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def own_logits(resnet, images):
    with torch.inference_mode():
        logits_NK = resnet(images)
    assert logits_NK.std() > 0.01
    return logits_NK


def same_state(first, second) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


# Write and read


def test_a_checkpoint_is_read_back_whole(resnet, folder):
    found = read_checkpoint(str(folder))
    assert found.class_names == CLASSES
    assert found.preprocessing == PREPROCESSING
    assert found.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert same_state(found.load_state_dict(), resnet.state_dict())


def test_a_checkpoint_is_written_to_and_read_from_s3(bucket, resnet):
    uri = f"s3://{bucket}/runs/a b/best"
    write_checkpoint(uri, resnet.state_dict(), CLASSES, PREPROCESSING)
    assert storage.list_names(uri) == [CONFIG, WEIGHTS]
    assert same_state(read_checkpoint(uri).load_state_dict(), resnet.state_dict())


def test_the_memory_format_does_not_change_the_files(resnet, folder, tmp_path):
    resnet.to(memory_format=torch.channels_last)
    write_checkpoint(str(tmp_path), resnet.state_dict(), CLASSES, PREPROCESSING)
    resnet.to(memory_format=torch.contiguous_format)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_the_config_has_what_other_programs_look_for(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["architecture"] == "resnet50"
    assert (config["num_classes"], config["num_features"]) == (3, 2048)
    assert config["label_names"] == list(CLASSES)
    assert config["id2label"] == {"0": "cats", "1": "dogs", "2": "żaby 50%"}
    assert config["label2id"] == {"cats": 0, "dogs": 1, "żaby 50%": 2}
    wanted = {"input_size": [3, 96, 96], "crop_pct": 0.875, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    assert config["pretrained_cfg"].items() >= (wanted | {"interpolation": "bilinear", "num_classes": 3}).items()


def test_the_weights_file_is_a_plain_safetensors_file(resnet, folder):
    assert same_state(load_file(folder / WEIGHTS), resnet.state_dict())


def test_parquet_metadata_describes_model_and_preprocessing(folder):
    found = read_checkpoint(str(folder))
    metadata = found.parquet_metadata()
    assert metadata["catsdogs.model_sha256"] == found.sha256
    assert json.loads(metadata["catsdogs.class_names"]) == list(CLASSES)
    assert json.loads(metadata["catsdogs.preprocessing"]) == {
        "img_size": 96,
        "resize_size": 109,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
    }


# timm


def test_timm_loads_model_and_preprocessing_from_the_folder(folder, images, own_logits):
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found(images), own_logits, atol=1e-4, rtol=1e-4)
    resolved = timm.data.resolve_data_config({}, model=found)
    assert tuple(resolved["input_size"]) == (3, 96, 96)
    assert resolved["interpolation"] == "bilinear"
    assert resolved["crop_pct"] == PREPROCESSING.crop_pct
    assert resolved["crop_mode"] == "center"
    assert (tuple(resolved["mean"]), tuple(resolved["std"])) == (PREPROCESSING.mean, PREPROCESSING.std)
    assert found.pretrained_cfg["label_names"] == list(CLASSES)


def test_timm_loads_a_checkpoint_with_a_calibration(folder, tmp_path):
    (tmp_path / WEIGHTS).symlink_to(folder / WEIGHTS)
    (tmp_path / CONFIG).write_bytes(serialize_config(CLASSES, PREPROCESSING, {"temperature": 2.0, "curves": {}}))
    found, expected = (timm.create_model(f"local-dir:{path}", pretrained=True) for path in (tmp_path, folder))
    assert same_state(found.state_dict(), expected.state_dict())
    assert found.pretrained_cfg == expected.pretrained_cfg | {"file": found.pretrained_cfg["file"]}
    assert read_checkpoint(str(tmp_path)).sha256 == read_checkpoint(str(folder)).sha256


def test_timm_loads_the_weights_alone(folder, images, own_logits):
    found = timm.create_model("resnet50", num_classes=3, checkpoint_path=str(folder / WEIGHTS)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found(images), own_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("img_size", [32, 224, 288])
def test_timms_transform_has_our_sizes(img_size):
    ours = Preprocessing(img_size=img_size)
    theirs = timm.data.create_transform(
        (3, img_size, img_size),
        interpolation="bilinear",
        mean=ours.mean,
        std=ours.std,
        crop_pct=ours.crop_pct,
    )
    assert theirs.transforms[0].size == ours.resize_size
    assert tuple(theirs.transforms[1].size) == (img_size, img_size)


# Damaged and foreign checkpoints


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_reported(folder, tmp_path, missing):
    for name in {CONFIG, WEIGHTS} - {missing}:
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/{missing}"):
        read_checkpoint(str(tmp_path))


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/absent/config.json: No such file"):
        read_checkpoint(f"{tmp_path}/absent")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: "not json",
        lambda config: "[]",
        lambda config: "{}",
        lambda config: json.dumps(config | {"pretrained_cfg": []}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"mean": "abc"}}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"input_size": 3}}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"input_size": [3, None]}}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"interpolation": "bicubic"}}),
        lambda config: json.dumps(config | {"architecture": "resnet18"}),
        lambda config: json.dumps({name: value for name, value in config.items() if name != "label_names"}),
        lambda config: json.dumps(config | {"label_names": None}),
        lambda config: json.dumps(config | {"label_names": "cats"}),
        lambda config: json.dumps(config | {"label_names": ["cats", "cats", "dogs"]}),
        lambda config: json.dumps(config | {"label_names": ["cats", "dogs", "\ud800"]}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"input_size": [3, 1e9]}}),
        lambda config: json.dumps(
            config | {"pretrained_cfg": config["pretrained_cfg"] | {"input_size": [3, math.inf]}}
        ),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"crop_pct": 1e-9}}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"mean": [1e308, 0, 0]}}),
        lambda config: json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"std": [1e-300, 1, 1]}}),
        lambda config: "[" * 100_000,
    ],
)
def test_a_damaged_config_is_refused(folder, tmp_path, change):
    (tmp_path / CONFIG).write_text(change(json.loads((folder / CONFIG).read_text())))
    (tmp_path / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path}/config.json: expected"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "resnet18"}, "expected the architecture resnet50, got 'resnet18'"),
        (
            {"pretrained_cfg": {"interpolation": "bicubic"}},
            "expected bilinear interpolation, .*, got 'bicubic'; fine-tune",
        ),
    ],
)
def test_what_differs_from_our_models_is_named(folder, tmp_path, change, words):
    config = json.loads((folder / CONFIG).read_text())
    pretrained = config["pretrained_cfg"] | change.get("pretrained_cfg", {})
    (tmp_path / CONFIG).write_text(json.dumps(config | change | {"pretrained_cfg": pretrained}))
    with pytest.raises(InputError, match=words):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{}" * 8],
    ids=["empty", "short", "huge header", "no header"],
)
def test_damaged_weights_are_refused(folder, tmp_path, content):
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path} is not a safetensors file"):
        read_checkpoint(str(tmp_path))


def test_a_safetensors_file_of_a_dtype_that_torch_lacks_is_refused():
    header = json.dumps({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(InputError, match=r"w\.safetensors is not a safetensors file: 'F4'"):
        parse_safetensors(content, "w.safetensors")


def test_weights_of_an_unknown_dtype_are_refused(resnet, folder, tmp_path):
    state = {name: tensor.to(torch.float8_e5m2) for name, tensor in resnet.state_dict().items()}
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path}: expected weights in F64 .*, found F8_E5M2"):
        read_checkpoint(str(tmp_path))


def test_weights_that_do_not_fit_are_refused(resnet, folder, tmp_path):
    state = dict(resnet.state_dict())
    del state["conv1.weight"]
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path}: expected .* ResNet50 .* keys missing: conv1.weight; check"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("conv1.weight", math.nan), ("fc.bias", -math.inf), ("layer4.2.bn3.running_var", -1.0)]
)
def test_weights_that_are_no_finite_numbers_are_refused(resnet, folder, tmp_path, name, value):
    state = dict(resnet.state_dict())
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path}: expected finite numbers and .* not so in {name}; the training"):
        read_checkpoint(str(tmp_path)).load_state_dict()


def test_truncated_weights_are_refused(folder, tmp_path):
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(InputError, match="is not a safetensors file"):
        read_checkpoint(str(tmp_path))
