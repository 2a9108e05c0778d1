"""A torch DataLoader loop in eager fp32; tuned: bf16, channels last, as many loading processes as do best."""

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.peers.common import (
    BATCH_SIZE,
    DEVICE,
    arguments,
    load_model,
    num_loaders,
    optimized,
    paths_of,
    suited,
    tell,
    transforms,
)


class Images(Dataset[tuple[torch.Tensor, str]]):
    """Files, decoded by Pillow."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.transforms = transforms()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        with Image.open(self.paths[i]) as image:
            return self.transforms(image.convert("RGB")), self.paths[i]


def main() -> None:
    """Label a folder."""
    options = arguments()
    model: torch.nn.Module = load_model(options.checkpoint)
    if options.tuned:
        model = optimized(model)
    batches = DataLoader(
        Images(paths_of(options.images)),
        BATCH_SIZE,
        num_workers=num_loaders(options.tuned),
        pin_memory=options.tuned and DEVICE.type == "cuda",
    )
    rows: dict[str, list[object]] = {"path": [], "index": []}
    with torch.inference_mode():
        for images, paths in batches:
            index = model(suited(images, model)).argmax(dim=1)
            rows["path"] += paths
            rows["index"] += index.tolist()
            tell(len(paths))
    pq.write_table(pa.table(rows), options.output)


if __name__ == "__main__":
    main()
