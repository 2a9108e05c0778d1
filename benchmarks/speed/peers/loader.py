"""A torch DataLoader loop in eager fp32; tuned: bf16, channels last, the fastest number of loading processes."""

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import (
    build_transforms,
    choose_num_workers,
    load_model,
    optimize,
    to_model_input,
)
from benchmarks.speed.protocol import BATCH_SIZE, DEVICE, list_images, parse_arguments


class Images(Dataset[tuple[torch.Tensor, str]]):
    """Images decoded by Pillow, with their paths."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.transforms = build_transforms()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        with Image.open(self.paths[i]) as image:
            return self.transforms(image.convert("RGB")), self.paths[i]


def main() -> None:
    """Classify a folder."""
    options = parse_arguments()
    model: torch.nn.Module = load_model(options.checkpoint)
    if options.tuned:
        model = optimize(model)
    batches = DataLoader(
        Images(list_images(options.images)),
        BATCH_SIZE,
        num_workers=choose_num_workers(options.tuned),
        pin_memory=options.tuned and DEVICE.type == "cuda",
    )
    rows: dict[str, list[object]] = {"path": [], "index": []}
    with torch.inference_mode():
        for images, paths in batches:
            index = model(to_model_input(images, model)).argmax(dim=1)
            rows["path"] += paths
            rows["index"] += index.tolist()
            report_batch(len(paths))
    pq.write_table(pa.table(rows), options.output)


if __name__ == "__main__":
    main()
