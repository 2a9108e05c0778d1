"""Batch inference as in Daft's documentation: columns for download and decoding, a class UDF for the model.

Tuned: bf16 and channels last.
"""

import daft
import torch
from daft import DataType, col
from PIL import Image

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import build_transforms, load_model, optimize, to_model_input
from benchmarks.speed.protocol import list_images, parse_arguments

BATCH_SIZE = 32


@daft.cls(max_concurrency=1)
class Model:
    """The UDF with the model."""

    def __init__(self, checkpoint: str, tuned: bool) -> None:
        model: torch.nn.Module = load_model(checkpoint)
        self.model = optimize(model) if tuned else model

    @daft.method.batch(return_dtype=DataType.int64(), batch_size=BATCH_SIZE)
    def classify(self, images: daft.Series) -> list[int]:
        """Classify a batch."""
        batch = torch.stack([build_transforms()(Image.fromarray(image)) for image in images.to_pylist()])
        with torch.inference_mode():
            index: list[int] = self.model(to_model_input(batch, self.model)).argmax(dim=1).tolist()
        report_batch(len(index))
        return index


def main() -> None:
    """Classify a folder."""
    options = parse_arguments()
    frame = daft.from_pydict({"path": list_images(options.images)})
    frame = frame.with_column("image", col("path").download().decode_image(mode="RGB"))
    frame = frame.with_column("index", Model(options.checkpoint, options.tuned).classify(col("image")))
    frame.select("path", "index").write_parquet(options.output)


if __name__ == "__main__":
    main()
