"""The weights that training starts from."""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import pickle
import random
import subprocess
import sys
import unicodedata
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from models import randomize_batchnorm
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights
from web_server import Response, WebServer, serve

from catsdogs import weights
from catsdogs.checkpoint import WEIGHTS, write_checkpoint
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.resnet import build_resnet50
from catsdogs.weights import PretrainedWeights, load_pretrained, load_state_dict_strictly

CLASSES = ("cats", "dogs", "żaby 50%")


@pytest.fixture(scope="module")
def resnet():
    return randomize_batchnorm(build_resnet50(len(CLASSES), seed=3)).eval()


@pytest.fixture(scope="module")
def folder(resnet, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint") / "best"
    write_checkpoint(str(made), resnet.state_dict(), CLASSES, Preprocessing())
    return made


@pytest.fixture(scope="module")
def fresh() -> Callable[[int], torch.nn.Module]:
    """Return models whose tensors are all zero; one per number of classes is built."""
    made = {}

    def give(num_classes: int):
        if num_classes not in made:
            made[num_classes] = build_resnet50(num_classes, seed=0)
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


def test_missing_unexpected_and_misshaped_keys_are_named(resnet, fresh):
    state = dict(resnet.state_dict())
    del state["conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["bn1.weight"] = torch.zeros(7)
    state |= {f"layer9.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(InputError) as caught:
        load_state_dict_strictly(fresh(3), state, "weights.pth")
    message = str(caught.value)
    assert "weights.pth: expected the tensors of a ResNet50 under torchvision's key names" in message
    assert "missing: conv1.weight;" in message
    assert "unexpected: extra.weight, layer9.0, layer9.1, layer9.2, layer9.3 and 5 more;" in message
    assert "of another shape: bn1.weight;" in message


def test_batch_counters_of_batchnorm_may_be_missing(resnet, fresh):
    state = {name: value for name, value in resnet.state_dict().items() if "num_batches" not in name}
    model = fresh(3)
    load_state_dict_strictly(model, state, "weights.pth")
    assert model.layer4[2].conv3.weight.equal(resnet.layer4[2].conv3.weight)


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
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state},
    "only EMA": lambda state: {"state_dict_ema": state, "optimizer": {"state": {}}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled and distributed": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "backbone": lambda state: {"state_dict": {f"backbone.{name}": value for name, value in state.items()}},
    "encoder": lambda state: {f"model.encoder.{name}": value for name, value in state.items()},
    "arguments": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1, model="resnet50")},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_torch_file_is_unwrapped(wrap):
    state = {"conv1.weight": torch.ones(2, 3), "layer1.0.conv1.weight": torch.ones(1), "fc.bias": torch.zeros(1)}
    found = PretrainedWeights("w", "w.pth", torch_bytes(wrap(state))).parse()
    assert found.keys() == state.keys()
    assert all(found[name].equal(state[name]) for name in state)


@pytest.mark.parametrize("suffix", ["pth.tar", "BIN"])
def test_a_wrapped_torch_file_with_a_fitting_head_is_loaded_whole(resnet, fresh, tmp_path, suffix):
    file = pth(WRAPPINGS["model of module"](resnet.state_dict()))(tmp_path).rename(tmp_path / f"w.{suffix}")
    model = fresh(3)
    assert load_pretrained(model, str(file), CLASSES) == f"weights and head from {file}"
    assert same_state(model, resnet.state_dict())


def test_weights_are_read_from_s3(bucket, resnet, fresh):
    uri = f"s3://{bucket}/runs/a b/best"
    write_checkpoint(uri, resnet.state_dict(), CLASSES, Preprocessing())
    model = fresh(3)
    assert load_pretrained(model, f"{uri}/{WEIGHTS}", CLASSES) == f"weights and head from {uri}/{WEIGHTS}"
    assert same_state(model, resnet.state_dict())


def test_a_safetensors_file_with_a_fitting_head_is_loaded_whole(resnet, fresh, folder):
    model = fresh(3)
    assert load_pretrained(model, str(folder / WEIGHTS), ("x", "y", "z")) == f"weights and head from {folder / WEIGHTS}"
    assert same_state(model, resnet.state_dict())


def test_the_prefix_of_a_safetensors_file_is_removed(resnet, fresh, tmp_path):
    save_file({f"_orig_mod.{name}": tensor for name, tensor in resnet.state_dict().items()}, tmp_path / "w.safetensors")
    model = fresh(3)
    load_pretrained(model, f"{tmp_path}/w.safetensors", CLASSES)
    assert same_state(model, resnet.state_dict())


@pytest.mark.parametrize(
    ("prefix", "others", "kept_head", "left_out"),
    [
        ("", {"fc.0.weight": (128, 2048), "fc.2.weight": (9, 128)}, False, None),  # an MLP as the head
        ("", {"fc.weight": (3, 2048)}, False, None),  # without a bias
        ("backbone.", {"fc.weight": (3, 2048), "fc.bias": (3,)}, True, None),
        ("encoder.", {"classifier.0.weight": (1,), "queue": (1,)}, False, "classifier.0.weight, queue"),
    ],
)
def test_only_the_backbone_must_fit(resnet, fresh, tmp_path, prefix, others, kept_head, left_out):
    state = {f"{prefix}{name}": v for name, v in resnet.state_dict().items() if not name.startswith("fc.")}
    file = pth(state | {name: torch.ones(shape) for name, shape in others.items()})(tmp_path)
    model = fresh(3)
    message = load_pretrained(model, str(file), CLASSES)
    assert message.endswith(f"; left out: {left_out}") == (left_out is not None)
    assert ("a new head for 3 classes" in message) == (not kept_head)
    assert bool(model.fc.weight.any()) == kept_head
    assert model.layer4[2].conv3.weight.equal(resnet.layer4[2].conv3.weight)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            [f"encoder_{i}.{name}" for i in "qk" for name in ("conv1.weight", "layer1.0.conv1.weight")],
            "expected one ResNet50, found several, whose keys start with 'encoder_k.', 'encoder_q.'",
        ),
        (["resnet.embedder.embedder.convolution.weight"], "these are of a ResNet of transformers"),
        (["layer1.0.conv1.weight", "layer1.0.conv2.weight"], "these are of a ResNet18 or 34"),
        (["conv1.weight", "layer3.6.conv1.weight"], "these are of a ResNet101 or 152"),
        (["module.features.0.weight"], "unexpected: module.features.0.weight; these are of a VGG, DenseNet"),
    ],
)
def test_foreign_keys_are_explained(fresh, tmp_path, names, words):
    file = pth({name: torch.zeros(1) for name in names})(tmp_path)
    with pytest.raises(InputError) as caught:
        load_pretrained(fresh(2), str(file), ("a", "b"))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("safe", "label_names"), [(True, list(CLASSES)), (False, ["x", "y", "z"]), (False, None)])
def test_a_folder_of_timm_is_taken_whatever_its_preprocessing(resnet, fresh, tmp_path, safe, label_names):
    model = timm.create_model("resnet50", num_classes=3)
    assert model.pretrained_cfg["interpolation"] == "bicubic"
    model.load_state_dict(resnet.state_dict())
    config = {"label_names": label_names} if label_names else {}
    timm.models.save_for_hf(model, str(tmp_path), model_config=config, safe_serialization=safe)
    ours = fresh(3)
    message = load_pretrained(ours, str(tmp_path), CLASSES)
    assert ours.conv1.weight.equal(resnet.conv1.weight)
    if label_names == list(CLASSES):
        assert message == f"weights and head from {tmp_path}"
        assert same_state(ours, resnet.state_dict())
    else:
        assert message.endswith("a new head for 3 classes replaces its own (3 classes)")


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


def test_class_names_of_a_checkpoint_are_compared_in_one_unicode_form(resnet, fresh, tmp_path):
    names = tuple(unicodedata.normalize("NFD", name) for name in CLASSES)
    assert names != CLASSES
    write_checkpoint(str(tmp_path), resnet.state_dict(), names, Preprocessing())
    assert load_pretrained(fresh(3), str(tmp_path), CLASSES) == f"weights and head from {tmp_path}"


@pytest.mark.parametrize("class_names", [("cats", "dogs", "mice"), ("dogs", "cats", "żaby 50%"), ("cats", "dogs")])
def test_a_checkpoint_of_other_classes_gets_a_new_head(resnet, fresh, folder, class_names):
    model = fresh(len(class_names))
    message = load_pretrained(model, str(folder), class_names)
    assert message == f"weights from {folder}; a new head for {len(class_names)} classes replaces its own (3 classes)"
    assert not model.fc.weight.any()
    assert model.conv1.weight.equal(resnet.conv1.weight)


def test_a_state_dict_without_a_head_gets_one(resnet, fresh, tmp_path):
    file = pth({name: v for name, v in resnet.state_dict().items() if not name.startswith("fc.")})(tmp_path)
    model = fresh(2)
    assert load_pretrained(model, str(file), ("a", "b")).endswith("a new head for 2 classes replaces its own (none)")
    assert model.conv1.weight.equal(resnet.conv1.weight)


def test_none_leaves_the_model_unchanged(fresh):
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
    with pytest.raises(
        InputError, match=r"is not a state dict that loads with weights_only=True: .* torch\.save\(model"
    ):
        load_pretrained(fresh(2), f"{tmp_path}/w.pth", ("a", "b"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", [torch.zeros(3), [1, 2], {"a": 1}, {0: torch.zeros(1)}, {"model": {"a": "b"}}, {"state_dict": 3}]
)
def test_a_torch_file_of_anything_else_is_refused(fresh, tmp_path, value):
    file = pth(value)(tmp_path)
    with pytest.raises(InputError, match=f"{file}: expected a state dict of tensors"):
        load_pretrained(fresh(2), str(file), ("a", "b"))


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(3, dtype=torch.float16).as_strided((10**6, 10**6), (0, 0)),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        lambda: torch.zeros(10**12, device="meta"),
        lambda: torch.zeros(3, dtype=torch.complex64),
    ],
    ids=["expanded", "strided", "sparse", "csr", "quantized", "meta", "complex"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_need_more_memory_than_the_file_or_are_not_dense_are_refused(fresh, tmp_path, build):
    file = pth({"conv1.weight": build()})(tmp_path)
    assert file.stat().st_size < 10_000
    with pytest.raises(
        InputError, match=f"{file}: expected dense real tensors .*, got conv1.weight: |{file} is not a "
    ):
        load_pretrained(fresh(2), str(file), ("a", "b"))


def test_names_that_share_one_memory_are_refused(fresh, tmp_path):
    shared = torch.zeros(10**5, dtype=torch.float16)  # each name would become a separate tensor
    file = pth({f"layer{i}.weight": shared for i in range(100)})(tmp_path)
    with pytest.raises(InputError, match=f"{file}: expected tensors of their own memory"):
        load_pretrained(fresh(2), str(file), ("a", "b"))


def test_attributes_from_the_file_do_not_replace_methods(fresh, tmp_path):
    tensor = torch.zeros(3)
    tensor.is_floating_point = 5
    file = pth({"conv1.weight": tensor})(tmp_path)
    with pytest.raises(InputError, match=f"{file}: expected tensors without attributes, got conv1.weight"):
        load_pretrained(fresh(2), str(file), ("a", "b"))
    state = OrderedDict({"conv1.weight": torch.zeros(3)})
    state.get = 5
    file = pth(state)(tmp_path)
    with pytest.raises(InputError, match=str(file)):
        load_pretrained(fresh(2), str(file), ("a", "b"))


def test_a_compressed_torch_file_is_refused_before_it_is_unpacked(fresh, tmp_path):
    file = tmp_path / "w.pth"
    stored = zipfile.ZipFile(io.BytesIO(torch_bytes({"a": torch.zeros(10**6)})))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    with pytest.raises(InputError, match=f"{file}: expected a file of torch.save, got a compressed zip file; save"):
        load_pretrained(fresh(2), str(file), ("a", "b"))


def test_an_empty_state_dict_is_refused(fresh, tmp_path):
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
            PretrainedWeights("w", "w.pth", damaged(buffer.getvalue(), rng)).parse()


def test_safetensors_are_checked_without_torch_and_loaded_where_the_file_is_not_seen(folder, fresh, resnet):
    code = """
import pickle, sys
from catsdogs.weights import read_pretrained
weights = read_pretrained(sys.argv[1])
weights.check(tuple(sys.argv[2:]))
assert "torch" not in sys.modules
sys.stdout.buffer.write(pickle.dumps(weights))
"""
    command = [sys.executable, "-c", code, str(folder), *CLASSES]
    sent = pickle.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    model = fresh(3)
    dataclasses.replace(sent, uri="/absent/model.safetensors").load(model, CLASSES)
    assert model.fc.weight.equal(resnet.fc.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_refused_in_every_type(resnet, fresh, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in resnet.state_dict().items() if tensor.is_floating_point()}
    save_file(tensors, tmp_path / "w.safetensors")
    load_pretrained(fresh(3), f"{tmp_path}/w.safetensors", CLASSES)
    tensors["bn1.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"expected finite numbers .*bn1\.weight"):
        load_pretrained(fresh(3), f"{tmp_path}/w.safetensors", CLASSES)


@pytest.mark.parametrize("name", ["absent", "w.zip", "resnet50"])
def test_weights_of_no_known_kind_are_refused(fresh, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--weights {name}: expected imagenet, none, a"):
        load_pretrained(fresh(2), name, ("a", "b"))


@pytest.mark.parametrize("name", ["absent.pth", "absent.bin", "absent.safetensors"])
def test_a_missing_weights_file_is_reported(fresh, tmp_path, name):
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/{name}: No such file"):
        load_pretrained(fresh(2), f"{tmp_path}/{name}", ("a", "b"))


@pytest.fixture
def imagenet(monkeypatch, tmp_path) -> Iterator[WebServer]:
    """Serve random weights as those of ImageNet, with torch's cache in `tmp_path`."""
    content = torch_bytes(build_resnet50(1000, seed=4).state_dict())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "IMAGENET_SHA256", hashlib.sha256(content).hexdigest())
    with serve() as server:
        monkeypatch.setattr(weights, "IMAGENET_URL", server.add("resnet50.pth", Response(body=content)))
        yield server


@pytest.mark.parametrize("variables", [{}, {"XDG_CACHE_HOME": "/cache"}, {"TORCH_HOME": "~/t", "XDG_CACHE_HOME": "/c"}])
def test_imagenet_weights_are_read_from_torchs_cache(monkeypatch, variables):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(weights.find_torch_cache()) == f"{torch.hub.get_dir()}/checkpoints"


def test_imagenet_weights_are_those_of_torchvision():
    assert ResNet50_Weights.IMAGENET1K_V2.url == weights.IMAGENET_URL
    assert f"resnet50-{weights.IMAGENET_SHA256[:8]}.pth" == weights.IMAGENET_URL.rpartition("/")[2]


def test_imagenet_weights_are_downloaded_once_and_get_a_new_head(fresh, imagenet):
    for num_classes in (2, 1000):
        model = fresh(num_classes)
        message = load_pretrained(model, "imagenet", tuple(map(str, range(num_classes))))
        assert message == f"weights from imagenet; a new head for {num_classes} classes replaces its own (1000 classes)"
        assert not model.fc.weight.any()
        assert model.conv1.weight.equal(build_resnet50(1000, seed=4).conv1.weight)
    assert imagenet.requests.total() == 1


def test_imagenet_weights_with_another_sha256_are_refused_and_not_cached(fresh, imagenet, tmp_path):
    other = Response(body=torch_bytes(build_resnet50(1000, seed=5).state_dict()))
    imagenet.add("resnet50.pth", other)
    with pytest.raises(InputError, match=r"invalid hash value.*--weights FILE, or start from --weights none"):
        load_pretrained(fresh(2), "imagenet", ("a", "b"))
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_a_changed_file_in_torchs_cache_is_refused(fresh, imagenet, tmp_path):
    cached = tmp_path / "hub" / "checkpoints" / "resnet50.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(torch_bytes(build_resnet50(1000, seed=5).state_dict()))
    with pytest.raises(
        InputError, match=rf"{cached}: expected the ImageNet weights, with the sha256.*remove this file"
    ):
        load_pretrained(fresh(2), "imagenet", ("a", "b"))
    assert not imagenet.requests


def test_a_failed_download_is_an_error_that_offers_alternatives(fresh, imagenet, monkeypatch):
    monkeypatch.setattr(weights, "IMAGENET_URL", "http://127.0.0.1:9/resnet50.pth")
    with pytest.raises(InputError, match=r"refused.*--weights FILE, or start from --weights none"):
        load_pretrained(fresh(2), "imagenet", ("a", "b"))
