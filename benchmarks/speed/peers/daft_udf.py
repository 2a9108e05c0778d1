"""Batch inference as Daft's documentation shows it: download and decode in the frame, a class UDF for the model.

Tuned: bf16 and channels last.
"""

import daft
import torch
from daft import DataType, col
from PIL import Image

from benchmarks.speed.peers.common import arguments, load_model, optimized, paths_of, suited, tell, transforms

BATCH_SIZE = 32


@daft.cls(max_concurrency=1)
class Model:
    """The UDF."""

    def __init__(self, checkpoint: str, tuned: bool) -> None:
        model: torch.nn.Module = load_model(checkpoint)
        self.model = optimized(model) if tuned else model

    @daft.method.batch(return_dtype=DataType.int64(), batch_size=BATCH_SIZE)
    def label(self, images: daft.Series) -> list[int]:
        """Label a batch."""
        batch = torch.stack([transforms()(Image.fromarray(image)) for image in images.to_pylist()])
        with torch.inference_mode():
            index = self.model(suited(batch, self.model)).argmax(dim=1).tolist()
        tell(len(index))
        return index


def main() -> None:
    """Label a folder."""
    options = arguments()
    frame = daft.from_pydict({"path": paths_of(options.images)})
    frame = frame.with_column("image", col("path").download().decode_image(mode="RGB"))
    frame = frame.with_column("index", Model(options.checkpoint, options.tuned).label(col("image")))
    frame.select("path", "index").write_parquet(options.output)


if __name__ == "__main__":
    main()
