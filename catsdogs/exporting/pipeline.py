"""export(): a checkpoint as a graph, checked before it is written. Calls, with the file of each:

    export
    ├── read_checkpoint         ../checkpoint.py    weights, class names, preprocessing, calibration
    ├── draw_references                             images, and their probabilities as `score` computes them
    ├── ExportedModel           graph.py            uint8 images to probabilities
    ├── trace, serialize        formats.py          graph to bytes
    ├── _compare                                    the bytes are run; their probabilities must be the same
    └── storage.write_bytes                         the graph, reference.npz; export.json is the last

Shapes: N images, H, W, K classes.
"""

import dataclasses
import io
import json
from typing import Any, NamedTuple

import numpy as np
import torch

from catsdogs import __version__, storage
from catsdogs.calibration import parse_calibration, scale_probs
from catsdogs.checkpoint import CONFIG, CheckpointFiles, read_checkpoint
from catsdogs.config import ExportConfig
from catsdogs.errors import RunError
from catsdogs.exporting.formats import FORMATS, INPUT, OUTPUT, Format, check_packages, trace
from catsdogs.exporting.graph import ExportedModel
from catsdogs.images import ImageArray
from catsdogs.predict import Predictor, draw_check_images
from catsdogs.predictions import FloatArray
from catsdogs.progress import Message, Progress

RECORD, REFERENCES = "export.json", "reference.npz"
NUM_REFERENCES = 8
MAX_DIFFERENCE = {"fp32": 1e-4, "fp16": 1e-2}  # of a probability
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Of the reference images with resizing, divided by the size of the model's input: larger, smaller, long, odd.
SIDES = ((1.0, 1.0), (1.5, 2.0), (2.5, 1.7), (0.5, 0.4), (0.3, 1.9), (2.2, 0.7), (1.04, 1.05), (3.0, 3.0))


class References(NamedTuple):
    """Reference images, uint8 (H, W, 3) each, and their probabilities, float32 (N, K)."""

    images: list[ImageArray]
    probs_NK: FloatArray


def export(config: ExportConfig, progress: Progress) -> dict[str, Any]:
    """Write a checkpoint as a graph; return the content of `export.json`."""
    config = dataclasses.replace(
        config, checkpoint=storage.absolute(config.checkpoint), output=storage.absolute(config.output)
    )
    check_packages(config.format)
    storage.list_names(config.output)  # fails now, not after the work, if the path is a file
    checkpoint = read_checkpoint(config.checkpoint)
    temperature = _read_temperature(checkpoint)
    state_dict = checkpoint.load_state_dict()
    references = draw_references(checkpoint, state_dict, temperature, config.with_resize)
    model = ExportedModel(
        state_dict, checkpoint.preprocessing, temperature, DTYPES[config.precision], config.with_resize
    )
    progress(Message(f"tracing the model for {config.format}"))
    example = torch.from_numpy(np.stack([references.images[1], references.images[1]]))
    program = trace(model, example, config.with_resize)
    found_format = FORMATS[config.format]
    record = _describe(config, checkpoint, temperature)
    content = found_format.serialize(program, {key: json.dumps(value) for key, value in record.items()})
    record["max_difference"] = _compare(found_format, content, references, MAX_DIFFERENCE[config.precision])
    _write(config.output, found_format.file_name, content, references, record)
    return record


def _read_temperature(checkpoint: CheckpointFiles) -> float:
    """Return the temperature of the checkpoint's calibration; 1 without one, or with one of other weights."""
    if checkpoint.calibration is None:
        return 1.0
    uri = storage.join(checkpoint.uri, CONFIG)
    calibration = parse_calibration(checkpoint.calibration, checkpoint.class_names, uri)
    return calibration.temperature if calibration.model_sha256 == checkpoint.sha256 else 1.0


def draw_references(
    checkpoint: CheckpointFiles, state_dict: dict[str, torch.Tensor], temperature: float, with_resize: bool
) -> References:
    """Draw images, the same at every call, and compute their probabilities as `score` does, in fp32."""
    size = checkpoint.preprocessing.img_size
    drawn_NHWC = draw_check_images(int(size * max(map(max, SIDES))) if with_resize else size)[:NUM_REFERENCES]
    images = list(drawn_NHWC)
    if with_resize:
        sides = [(max(1, int(size * height)), max(1, int(size * width))) for height, width in SIDES]
        images = [np.array(image[:h, :w]) for image, (h, w) in zip(images, sides, strict=True)]
    predictor = Predictor(state_dict, checkpoint.preprocessing, "fp32", torch.device("cpu"))
    inputs_NHWC = np.stack([checkpoint.preprocessing(image) if with_resize else image for image in images])
    return References(images, scale_probs(predictor(inputs_NHWC), temperature))


def _describe(config: ExportConfig, checkpoint: CheckpointFiles, temperature: float) -> dict[str, Any]:
    """Describe a graph, in its metadata and in `export.json`."""
    size = checkpoint.preprocessing.img_size
    sides = ["H", "W"] if config.with_resize else [size, size]
    return {
        "format": config.format,
        "precision": config.precision,
        "with_resize": config.with_resize,
        "inputs": {INPUT: {"dtype": "uint8", "shape": ["N", *sides, 3], "channels": "RGB"}},
        "outputs": {OUTPUT: {"dtype": "float32", "shape": ["N", len(checkpoint.class_names)]}},
        "class_names": list(checkpoint.class_names),
        "model_sha256": checkpoint.sha256,
        "temperature": temperature,
        "preprocessing": dataclasses.asdict(checkpoint.preprocessing)
        | {"resize_size": checkpoint.preprocessing.resize_size},
        "versions": {"catsdogs": __version__, "torch": torch.__version__},
    }


def _compare(found_format: Format, content: bytes, references: References, limit: float) -> float:
    """Run a graph on the reference images; return the largest difference of a probability."""
    probs_NK = found_format.run(content, references.images)
    difference = float(np.abs(probs_NK - references.probs_NK).max())
    if not difference <= limit:  # NaN is refused
        raise RunError(
            f"the exported graph differs from the model: by {difference:.2g} in a probability, expected at most "
            f"{limit:g}; nothing was written"
        )
    return difference


def _write(output: str, file_name: str, content: bytes, references: References, record: dict[str, Any]) -> None:
    """Write the files; `export.json` is the last, so that it never stands beside those of another export."""
    buffer = io.BytesIO()
    named = {f"image_{i}": image for i, image in enumerate(references.images)}
    np.savez_compressed(buffer, probabilities=references.probs_NK, **named)  # type: ignore[arg-type]
    contents = {file_name: content, REFERENCES: buffer.getvalue(), RECORD: json.dumps(record, indent=2).encode()}
    obsolete = [found_format.file_name for found_format in FORMATS.values() if found_format.file_name != file_name]
    storage.write_files(output, contents, obsolete)
