"""Checkpoints are written to disk, and read back by us and by timm."""

import contextlib
import hashlib
import io
import json
import pickle
import random
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models._api
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet50_Weights

from catsdogs import checkpoint, storage
from catsdogs.checkpoint import load, load_pretrained, load_state, save
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.model import build
from catsdogs.saved import CONFIG, WEIGHTS, read, resnet50_shapes

CLASSES = ("cats", "dogs", "żaby 50%")
PREPROCESSING = Preprocessing(img_size=96, crop_pct=0.875, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def resnet():
    """Make a model whose BatchNorm layers do something."""
    made = build(len(CLASSES), seed=3)
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.3, 0.9, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.num_batches_tracked.fill_(17)
    return made.eval()


@pytest.fixture(scope="module")
def folder(resnet, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("saved") / "best"
    save(str(made), resnet, CLASSES, PREPROCESSING)
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


@pytest.fixture(scope="module")
def fresh() -> Callable[[int], torch.nn.Module]:
    """Give models with zeros everywhere, made once a number of classes."""
    made = {}

    def give(num_classes: int):
        if num_classes not in made:
            made[num_classes] = build(num_classes, seed=0)
        with torch.no_grad():
            for tensor in made[num_classes].state_dict().values():
                tensor.zero_()
        return made[num_classes]

    return give


def same_state(model, state) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(own[name].equal(state[name]) for name in own)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# Save and load


def test_a_checkpoint_comes_back_whole(resnet, folder):
    found = load(str(folder))
    assert found.class_names == CLASSES
    assert found.preprocessing == PREPROCESSING
    assert found.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert same_state(found.model, resnet.state_dict())
    assert not found.model.training


def test_a_checkpoint_and_its_weights_come_back_from_s3(bucket, resnet, fresh):
    uri = f"s3://{bucket}/runs/a b/best"
    save(uri, resnet, CLASSES, PREPROCESSING)
    assert storage.list_names(uri) == [CONFIG, WEIGHTS]
    assert same_state(load(uri).model, resnet.state_dict())
    model = fresh(3)
    assert load_pretrained(model, f"{uri}/{WEIGHTS}", CLASSES) == f"weights and head from {uri}/{WEIGHTS}"
    assert same_state(model, resnet.state_dict())


def test_a_model_in_another_memory_format_is_saved_alike(resnet, folder, tmp_path):
    save(str(tmp_path), resnet.to(memory_format=torch.channels_last), CLASSES, PREPROCESSING)
    resnet.to(memory_format=torch.contiguous_format)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_the_config_names_what_other_programs_look_for(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["architecture"] == "resnet50"
    assert (config["num_classes"], config["num_features"]) == (3, 2048)
    assert config["label_names"] == list(CLASSES)
    assert config["id2label"] == {"0": "cats", "1": "dogs", "2": "żaby 50%"}
    assert config["label2id"] == {"cats": 0, "dogs": 1, "żaby 50%": 2}
    wanted = {"input_size": [3, 96, 96], "crop_pct": 0.875, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    assert config["pretrained_cfg"].items() >= (wanted | {"interpolation": "bilinear", "num_classes": 3}).items()


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


def test_timm_loads_the_weights_alone(folder, images, own_logits):
    found = timm.create_model("resnet50", num_classes=3, checkpoint_path=str(folder / WEIGHTS)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found(images), own_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("img_size", [32, 224, 288])
def test_timms_transform_resizes_as_we_do(img_size):
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
def test_a_missing_file_is_named(folder, tmp_path, missing):
    for name in {CONFIG, WEIGHTS} - {missing}:
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/{missing}"):
        load(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/absent/config.json: No such file"):
        load(f"{tmp_path}/absent")


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
    ],
)
def test_a_damaged_config_is_named(folder, tmp_path, change):
    (tmp_path / CONFIG).write_text(change(json.loads((folder / CONFIG).read_text())))
    (tmp_path / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path}/config.json: expected"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{}" * 8],
    ids=["empty", "short", "huge header", "no header"],
)
def test_damaged_weights_are_named(folder, tmp_path, content):
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path} is not a safetensors file"):
        load(str(tmp_path))


def test_a_safetensors_file_of_unknown_numbers_is_named():
    header = json.dumps({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(InputError, match=r"w\.safetensors is not a safetensors file: 'F4'"):
        checkpoint._parse_safetensors(content, "w.safetensors")


def test_weights_in_unknown_numbers_are_named(resnet, folder, tmp_path):
    state = {name: tensor.to(torch.float8_e5m2) for name, tensor in resnet.state_dict().items()}
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path}: expected weights in F64 .*, found F8_E5M2"):
        read(str(tmp_path))


def test_the_shapes_are_those_of_torchvisions_model():
    own = {name: tuple(tensor.shape) for name, tensor in build(num_classes=7, seed=0).state_dict().items()}
    assert resnet50_shapes(num_classes=7) == own


def test_what_does_not_fit_is_told_without_a_model(resnet, folder, tmp_path):
    state = dict(resnet.state_dict())
    del state["conv1.weight"]
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"{tmp_path} is no ResNet50 .* missing: conv1.weight; check --weights"):
        read(str(tmp_path))


def test_weights_that_end_early_are_named(folder, tmp_path):
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(InputError, match="is not a safetensors file"):
        load(str(tmp_path))


def test_missing_unexpected_and_misshaped_keys_are_named(resnet, fresh):
    state = dict(resnet.state_dict())
    del state["conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["bn1.weight"] = torch.zeros(7)
    state |= {f"layer9.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(InputError) as caught:
        load_state(fresh(3), state, "weights.pth")
    words = str(caught.value)
    assert "weights.pth is no ResNet50 of torchvision's key names" in words
    assert "missing: conv1.weight;" in words
    assert "unexpected: extra.weight, layer9.0, layer9.1, layer9.2, layer9.3 and 5 more;" in words
    assert "of another shape: bn1.weight;" in words


def test_the_counters_of_norms_may_be_missing(resnet, fresh):
    state = {name: value for name, value in resnet.state_dict().items() if "num_batches" not in name}
    model = fresh(3)
    load_state(model, state, "weights.pth")
    assert model.layer4[2].conv3.weight.equal(resnet.layer4[2].conv3.weight)


# Weights to start from


def pth(value: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "w.pth").write_bytes(torch_bytes(value))
        return folder / "w.pth"

    return write


WRAPPINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "arch": "resnet50"},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "model of module": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_torch_file_is_unwrapped(wrap):
    state = {"conv1.weight": torch.ones(2, 3), "fc.bias": torch.zeros(1)}
    found = checkpoint._parse_torch(torch_bytes(wrap(state)), "w.pth")
    assert found.keys() == state.keys()
    assert all(found[name].equal(state[name]) for name in state)


def test_a_wrapped_torch_file_with_a_fitting_head_is_taken_whole(resnet, fresh, tmp_path):
    file = pth(WRAPPINGS["model of module"](resnet.state_dict()))(tmp_path)
    model = fresh(3)
    assert load_pretrained(model, str(file), CLASSES) == f"weights and head from {file}"
    assert same_state(model, resnet.state_dict())


def test_a_safetensors_file_with_a_fitting_head_is_taken_whole(resnet, fresh, folder):
    model = fresh(3)
    assert load_pretrained(model, str(folder / WEIGHTS), ("x", "y", "z")) == f"weights and head from {folder / WEIGHTS}"
    assert same_state(model, resnet.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_fp16_weights_become_fp32(resnet, fresh, tmp_path, suffix):
    half = {name: v.half() if v.is_floating_point() else v for name, v in resnet.state_dict().items()}
    file = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        file.write_bytes(torch_bytes(half))
    else:
        save_file(half, file)
    model = fresh(3)
    load_pretrained(model, str(file), CLASSES)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.conv1.weight.equal(half["conv1.weight"].float())


def test_a_checkpoint_of_the_same_classes_keeps_its_head(resnet, fresh, folder):
    model = fresh(3)
    assert load_pretrained(model, str(folder), CLASSES) == f"weights and head from {folder}"
    assert same_state(model, resnet.state_dict())


@pytest.mark.parametrize("class_names", [("cats", "dogs", "mice"), ("dogs", "cats", "żaby 50%"), ("cats", "dogs")])
def test_a_checkpoint_of_other_classes_gets_a_new_head(resnet, fresh, folder, class_names):
    model = fresh(len(class_names))
    said = load_pretrained(model, str(folder), class_names)
    assert said == f"weights from {folder}; a new head for {len(class_names)} classes replaces its own (3 classes)"
    assert not model.fc.weight.any()
    assert model.conv1.weight.equal(resnet.conv1.weight)


def test_a_state_dict_without_a_head_gets_one(resnet, fresh, tmp_path):
    file = pth({name: v for name, v in resnet.state_dict().items() if not name.startswith("fc.")})(tmp_path)
    model = fresh(2)
    assert load_pretrained(model, str(file), ("a", "b")).endswith("a new head for 2 classes replaces its own (none)")
    assert model.conv1.weight.equal(resnet.conv1.weight)


def test_none_leaves_the_model_as_it_is(fresh):
    model = fresh(2)
    assert load_pretrained(model, "none", ("a", "b")) == "random weights"
    assert not model.conv1.weight.any()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save_as", [torch_bytes, lambda value: pickle.dumps(value, protocol=2)], ids=["zip", "pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(fresh, tmp_path, save_as):
    (tmp_path / "w.pth").write_bytes(save_as({"fc.weight": Malicious(tmp_path / "ran")}))
    with pytest.raises(InputError, match="is not a state dict that loads with weights_only=True"):
        load_pretrained(fresh(2), f"{tmp_path}/w.pth", ("a", "b"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", [torch.zeros(3), [1, 2], {"a": 1}, {0: torch.zeros(1)}, {"model": {"a": "b"}}, {"state_dict": 3}]
)
def test_a_torch_file_of_anything_else_is_named(fresh, tmp_path, value):
    file = pth(value)(tmp_path)
    with pytest.raises(InputError, match=f"{file}: expected a state dict of tensors"):
        load_pretrained(fresh(2), str(file), ("a", "b"))


def test_an_empty_state_dict_is_no_resnet(fresh, tmp_path):
    with pytest.raises(InputError, match=r"missing: bn1\.bias"):
        load_pretrained(fresh(2), str(pth({})(tmp_path)), ("a", "b"))


def damaged(content: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(3)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 9)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("old_format", [False, True])
def test_damaged_torch_files_are_refused_or_read(old_format):
    buffer = io.BytesIO()
    state = {"a": torch.zeros(3), "b": {"c": [1, "x", torch.ones(2, 2)]}}
    torch.save(state, buffer, _use_new_zipfile_serialization=not old_format)
    rng = random.Random(0)
    for _ in range(400):
        with contextlib.suppress(InputError):
            checkpoint._parse_torch(damaged(buffer.getvalue(), rng), "w.pth")


@pytest.mark.parametrize("weights", ["absent", "w.bin", "resnet50"])
def test_weights_of_no_known_kind_are_explained(fresh, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--weights {weights}: expected imagenet, none, a"):
        load_pretrained(fresh(2), weights, ("a", "b"))


@pytest.mark.parametrize("weights", ["absent.pth", "absent.safetensors"])
def test_a_missing_weights_file_is_named(fresh, tmp_path, weights):
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/{weights}: No such file"):
        load_pretrained(fresh(2), f"{tmp_path}/{weights}", ("a", "b"))


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), RuntimeError("invalid hash value (expected 1, got 2)")],
)
def test_a_failing_download_says_what_to_do(fresh, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(InputError, match=r"(no route|invalid hash).*--weights FILE, or start from --weights none"):
        load_pretrained(fresh(2), "imagenet", ("a", "b"))


def test_imagenet_weights_get_a_new_head_whatever_the_number_of_classes(fresh, monkeypatch):
    state = build(1000, seed=4).state_dict()
    asked = []
    monkeypatch.setattr(
        torchvision.models._api,
        "load_state_dict_from_url",
        lambda *a, **k: asked.append((a, k)) or dict(state),
    )
    for num_classes in (2, 1000):
        model = fresh(num_classes)
        said = load_pretrained(model, "imagenet", tuple(map(str, range(num_classes))))
        assert said == f"weights from imagenet; a new head for {num_classes} classes replaces its own (1000 classes)"
        assert not model.fc.weight.any()
        assert model.conv1.weight.equal(state["conv1.weight"])
    (url,), options = asked[0]
    assert url == ResNet50_Weights.IMAGENET1K_V2.url
    assert options["check_hash"]


def test_imagenet_weights_are_taken_from_the_hub_cache(fresh, monkeypatch, tmp_path):
    content = torch_bytes(build(1000, seed=4).state_dict())
    digest = hashlib.sha256(content).hexdigest()[:8]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / f"resnet50-{digest}.pth").write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = ResNet50_Weights.IMAGENET1K_V2
    monkeypatch.setattr(weights.value, "url", f"http://127.0.0.1:9/resnet50-{digest}.pth", raising=True)
    model = fresh(2)
    load_pretrained(model, "imagenet", ("a", "b"))
    assert model.conv1.weight.any()


def test_the_weights_file_is_plain_safetensors_for_any_reader(resnet, folder):
    assert same_state(resnet, load_file(folder / WEIGHTS))
