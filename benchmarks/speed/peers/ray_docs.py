"""Batch inference as in Ray's documentation: read_images, a row-wise map, one actor, write_parquet.

https://docs.ray.io/en/latest/data/examples/pytorch_resnet_batch_prediction.html; tuned: all threads, bf16,
channels last.
"""

import os
from typing import Any

import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import build_transforms, load_model, optimize, to_model_input
from benchmarks.speed.protocol import BATCH_SIZE, DEVICE, parse_arguments

Batch = dict[str, Any]


def preprocess(row: Batch) -> Batch:
    """Preprocess one decoded image."""
    return {"path": row["path"], "image": build_transforms()(Image.fromarray(row["image"])).numpy()}


class Model:
    """The actor with the model."""

    def __init__(self, checkpoint: str, tuned: bool) -> None:
        model: torch.nn.Module = load_model(checkpoint)
        if tuned:
            torch.set_num_threads(os.cpu_count() or 1)
            model = optimize(model)
        self.model = model

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Classify a batch."""
        index = self.model(to_model_input(torch.from_numpy(batch["image"]), self.model)).argmax(dim=1).cpu().numpy()
        report_batch(len(index))
        return {"path": batch["path"], "index": index}


def main() -> None:
    """Classify a folder."""
    options = parse_arguments()
    ray.init("local")
    images = ray.data.read_images(options.images, include_paths=True, mode="RGB").map(preprocess)
    predictions = images.map_batches(
        Model,
        fn_constructor_args=(options.checkpoint, options.tuned),
        batch_size=BATCH_SIZE,
        compute=ActorPoolStrategy(size=1),
        num_gpus=1 if DEVICE.type == "cuda" else None,
    )
    predictions.write_parquet(options.output)


if __name__ == "__main__":
    main()
