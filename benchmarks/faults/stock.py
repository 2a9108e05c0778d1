"""The pipeline of Ray's documentation: read, decode with Pillow, a model in an actor, write_parquet.

A try/except turns a bad image into a row without a label; without it, every run would fail at the first one.
`--reader images` uses `read_images`, which fails at the first bad file.
"""

import argparse
import io
import os
from typing import Any

import numpy as np
import pyarrow.fs
import ray
from PIL import Image
from ray.data.checkpoint import CheckpointConfig
from ray.data.expressions import download

BATCH_SIZE = 32
ROWS_PER_BLOCK = 100  # as in our parts; by default, Ray makes two blocks of such a small manifest
IMG_SIZE = 32
CLASSES = np.array(["blue", "red"], dtype=object)
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
Batch = dict[str, Any]


def preprocess(image: Image.Image) -> np.ndarray[Any, Any]:
    """Resize and normalize an image, float32 (3, S, S)."""
    small = np.asarray(image.convert("RGB").resize((IMG_SIZE, IMG_SIZE)), dtype=np.float32)
    return ((small / 255 - MEAN) / STD).transpose(2, 0, 1)


def decode(row: Batch) -> Batch:
    """Decode one downloaded file; zeros where that fails."""
    try:
        with Image.open(io.BytesIO(row.pop("bytes"))) as image:
            return row | {"image": preprocess(image), "good": True}
    except Exception:  # noqa: BLE001 - as users write it
        return row | {"image": np.zeros((3, IMG_SIZE, IMG_SIZE), np.float32), "good": False}


def preprocess_row(row: Batch) -> Batch:
    """Preprocess an image that read_images decoded."""
    return {"path": row["path"], "image": preprocess(Image.fromarray(row["image"])), "good": True}


class Model:
    """The actor. Only it imports torch, which takes seconds in every process."""

    def __init__(self, checkpoint: str) -> None:
        from safetensors.torch import load_file
        from torchvision.models import resnet50

        self.model = resnet50(num_classes=len(CLASSES))
        self.model.load_state_dict(load_file(os.path.join(checkpoint, "model.safetensors")))
        self.model.eval()

    def __call__(self, batch: Batch) -> Batch:
        """Classify a batch."""
        import torch

        with torch.inference_mode():
            probs = self.model(torch.as_tensor(batch["image"])).softmax(dim=1)
        prob, index = (values.numpy() for values in probs.max(dim=1))
        labels = np.where(batch["good"], CLASSES[index], None)
        return {"path": batch["path"], "label": labels, "prob": np.where(batch["good"], prob, np.nan)}


def main() -> None:
    """Run the pipeline once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reader", choices=("download", "images"), required=True)
    for flag in ("--input", "--checkpoint", "--output"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--resume-from", default="", help="the folder of Ray's CheckpointConfig")
    options = parser.parse_args()
    filesystem = open_filesystem(options.input)
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False  # its reader starts two actors for one small file
    if options.resume_from:
        context.checkpoint_config = CheckpointConfig(
            id_column="path", checkpoint_path=options.resume_from, override_filesystem=filesystem
        )
    if options.reader == "images":
        images = ray.data.read_images(options.input, filesystem=filesystem, include_paths=True, mode="RGB")
        decoded = images.map(preprocess_row)
    else:
        names = ray.data.read_parquet(options.input, filesystem=filesystem).repartition(
            target_num_rows_per_block=ROWS_PER_BLOCK
        )
        decoded = names.with_column("bytes", download("path", filesystem=filesystem)).map(decode)
    predictions = decoded.map_batches(
        Model,
        fn_constructor_args=(options.checkpoint,),
        batch_size=BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,  # the pipeline reserves one of two CPUs; a second one here would leave none to the other stages
    )
    predictions.write_parquet(options.output, filesystem=filesystem)


def open_filesystem(uri: str) -> pyarrow.fs.FileSystem | None:
    """Open S3 at the endpoint of the environment; None for the local disk."""
    if not uri.startswith("s3://"):
        return None
    scheme, _, host = os.environ["AWS_ENDPOINT_URL_S3"].partition("://")
    return pyarrow.fs.S3FileSystem(endpoint_override=host, scheme=scheme)


if __name__ == "__main__":
    main()
