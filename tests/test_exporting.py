"""Exported graphs: run by ONNX Runtime and torch.export, compared with the probabilities of `score`."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import CLASSES, lines_of, red_or_blue
from PIL import Image

from catsdogs import storage
from catsdogs.calibration import scale_probs
from catsdogs.checkpoint import read_checkpoint
from catsdogs.config import ExportConfig
from catsdogs.errors import InputError, RunError
from catsdogs.exporting import export, pipeline
from catsdogs.exporting.graph import ResizeAndCrop
from catsdogs.images import Preprocessing
from catsdogs.predict import Predictor

TEMPERATURE = 2.5
EXPORT_PAGE = Path(__file__).parents[1] / "docs" / "export.md"
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}


@pytest.fixture(scope="module")
def calibrated(red_blue_checkpoint, tmp_path_factory):
    """A checkpoint with a calibration; the probabilities of `score` for images of any size, calibrated."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(red_blue_checkpoint, folder, dirs_exist_ok=True)
    checkpoint = read_checkpoint(str(folder))
    curves = {name: {"rank": [], "mistakes": [], "confidence": []} for name in CLASSES}
    both = {"before": 0.5, "after": 0.4}
    calibration = {"model_sha256": checkpoint.sha256, "temperature": TEMPERATURE, "fitted": True, "n": 9}
    calibration |= {"mistakes": 5, "log_loss": both, "expected_calibration_error": both, "curves": curves}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"calibration": calibration}))
    predictor = Predictor(checkpoint.load_state_dict(), checkpoint.preprocessing, "fp32", torch.device("cpu"))
    return folder, lambda images: scale_probs(
        predictor(np.stack(list(map(checkpoint.preprocessing, images)))), TEMPERATURE
    )


@pytest.fixture(scope="module")
def exports(calibrated, tmp_path_factory):
    """The folders of graphs with resizing, by format."""
    folder = tmp_path_factory.mktemp("exports")
    for name in FILES:
        export(ExportConfig(checkpoint=str(calibrated[0]), output=str(folder / name), format=name, with_resize=True))
    return folder


def draw(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return (noise // 4 + np.array([20, 60, 150 - seed * 10])).astype(np.uint8)


def run_onnx(file, images_NHWC):
    (probs_NK,) = onnxruntime.InferenceSession(file).run(None, {"images": images_NHWC})
    return probs_NK


def run_torch(file, images_NHWC):
    return torch.export.load(file).module()(torch.from_numpy(images_NHWC)).numpy()


@pytest.mark.parametrize(
    "size", [(50, 300), (300, 50), (225, 225), (224, 400), (700, 1000), (5, 7), (1, 1), (33, 1056)]
)
def test_the_resizing_of_the_graph_gives_the_pixels_of_score(size):
    preprocessing = Preprocessing(img_size=224)
    image = draw(*size)
    found = ResizeAndCrop(preprocessing)(torch.from_numpy(image)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, preprocessing(image))


def test_a_strip_is_resized_without_the_weights_of_what_is_cropped():
    images_NHWC = torch.from_numpy(draw(1, 300))[None]
    with torch.profiler.profile(profile_memory=True) as profile:
        ResizeAndCrop(Preprocessing(img_size=224))(images_NHWC)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < 100 << 20  # of all tensors


@pytest.mark.parametrize(("name", "run"), [("onnx", run_onnx), ("torch", run_torch)])
def test_a_graph_gives_the_calibrated_probabilities_of_score(exports, calibrated, name, run):
    for size, num_images in (((64, 48), 3), ((31, 90), 1)):
        images_NHWC = np.stack([draw(*size, seed) for seed in range(num_images)])
        found_NK = run(exports / name / FILES[name], images_NHWC)
        np.testing.assert_allclose(found_NK, calibrated[1](images_NHWC), atol=1e-5)
        assert found_NK.dtype == np.float32


def test_a_probability_that_is_0_in_float32_is_calibrated_as_score_does(red_blue_checkpoint):
    checkpoint = read_checkpoint(str(red_blue_checkpoint))
    state_dict = checkpoint.load_state_dict()
    state_dict["fc.weight"].zero_()
    state_dict["fc.bias"].copy_(torch.tensor([0.0, 150.0]))
    size = checkpoint.preprocessing.img_size
    images_NHWC = draw(size, size)[None]
    probs_NK = Predictor(state_dict, checkpoint.preprocessing, "fp32", torch.device("cpu"))(images_NHWC)
    model = pipeline.ExportedModel(state_dict, checkpoint.preprocessing, 24.0, torch.float32, with_resize=False)
    found_NK = model(torch.from_numpy(images_NHWC)).numpy()
    np.testing.assert_allclose(found_NK, scale_probs(probs_NK, 24.0), rtol=1e-4)


def test_the_script_of_the_page_gives_the_label(exports, calibrated, tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", EXPORT_PAGE.read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "export").symlink_to(exports / "onnx")
    (tmp_path / "photo.jpg").write_bytes(red_or_blue("red", 3))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    label, prob = done.stdout.split()
    expected_K = calibrated[1]([np.asarray(Image.open(tmp_path / "photo.jpg"))])[0]
    assert (label, float(prob)) == (CLASSES[expected_K.argmax()], pytest.approx(expected_K.max(), abs=1e-5))


def test_the_reference_images_go_with_the_graph(exports):
    with np.load(exports / "onnx" / "reference.npz") as references:
        images, probs_NK = [references[f"image_{i}"] for i in range(8)], references["probabilities"]
    assert len({image.shape for image in images}) == 8
    found_NK = np.concatenate([run_onnx(exports / "onnx" / "model.onnx", image[None]) for image in images])
    np.testing.assert_allclose(found_NK, probs_NK, atol=1e-4)


def test_the_metadata_has_classes_model_and_preprocessing(exports, calibrated):
    record = json.loads((exports / "onnx" / "export.json").read_text())
    checkpoint = read_checkpoint(str(calibrated[0]))
    assert record["class_names"] == list(CLASSES)
    assert record["model_sha256"] == checkpoint.sha256
    assert record["temperature"] == TEMPERATURE
    assert record["preprocessing"]["resize_size"] == checkpoint.preprocessing.resize_size
    assert 0 <= record["max_difference"] <= 1e-4
    expected = {key: json.dumps(value) for key, value in record.items() if key not in ("max_difference", "format")}
    found = onnxruntime.InferenceSession(exports / "onnx" / "model.onnx").get_modelmeta().custom_metadata_map
    assert found.items() >= expected.items()
    extra_files = {"metadata.json": ""}
    torch.export.load(exports / "torch" / "model.pt2", extra_files=extra_files)
    assert json.loads(extra_files["metadata.json"]).items() >= expected.items()


def test_half_precision_without_resizing_is_written_to_a_bucket(red_blue_checkpoint, bucket, tmp_path):
    output, events = f"s3://{bucket}/export", []
    config = ExportConfig(checkpoint=str(red_blue_checkpoint), output=output, precision="fp16")
    storage.write_bytes(f"{output}/model.pt2", b"of an earlier export, perhaps of another model")
    record = export(config, events.append)
    assert lines_of(events) == ["tracing the model for onnx"]
    assert record["temperature"] == 1
    assert set(storage.list_names(output)) == {"model.onnx", "reference.npz", "export.json"}
    (tmp_path / "model.onnx").write_bytes(storage.read_bytes(f"{output}/model.onnx"))
    checkpoint = read_checkpoint(str(red_blue_checkpoint))
    predictor = Predictor(checkpoint.load_state_dict(), checkpoint.preprocessing, "fp32", torch.device("cpu"))
    images_NHWC = np.stack([checkpoint.preprocessing(draw(40, 40, seed)) for seed in range(5)])
    np.testing.assert_allclose(run_onnx(tmp_path / "model.onnx", images_NHWC), predictor(images_NHWC), atol=1e-2)


def test_a_graph_that_differs_is_refused_and_nothing_is_written(red_blue_checkpoint, tmp_path, monkeypatch):
    class Damaged(pipeline.ExportedModel):
        def forward(self, images):
            return super().forward(images).flip(1)

    monkeypatch.setattr(pipeline, "ExportedModel", Damaged)
    config = ExportConfig(checkpoint=str(red_blue_checkpoint), output=str(tmp_path / "out"), format="torch")
    with pytest.raises(RunError, match=r"the exported graph differs from the model: by .*; nothing was written"):
        export(config)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_command_to_install_it(red_blue_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    config = ExportConfig(checkpoint=str(red_blue_checkpoint), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="onnxruntime: pip install onnx onnxscript onnxruntime; or use --format torch"):
        export(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "tflite"}, "--format: expected onnx or torch, got 'tflite'"),
        ({"precision": "int8"}, "--precision: expected fp32 or fp16, got 'int8'"),
        ({"checkpoint": "absent"}, "absent/config.json"),
        ({"output": "a file"}, "a file"),
        ({"checkpoint": "damaged"}, "expected a calibration that catsdogs wrote"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(red_blue_checkpoint, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    shutil.copytree(red_blue_checkpoint, "damaged")
    config = json.loads(Path("damaged/config.json").read_text())
    Path("damaged/config.json").write_text(json.dumps(config | {"calibration": {"temperature": 1}}))
    with pytest.raises(InputError, match=words) as error:
        export(ExportConfig(**({"checkpoint": str(red_blue_checkpoint), "output": "out"} | settings)))
    assert "\n" not in str(error.value)
    assert not Path("out").exists()
