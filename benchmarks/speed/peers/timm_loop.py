"""timm as its documentation uses it: its configuration, loader and model; tuned: bf16, channels last."""

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from timm.data import ImageDataset, create_loader, resolve_data_config

from benchmarks.speed.peers.common import arguments, optimized, suited, tell

BATCH_SIZE = 32


def main() -> None:
    """Label a folder."""
    options = arguments()
    model: torch.nn.Module = timm.create_model(f"local-dir:{options.checkpoint}", pretrained=True).eval()
    if options.tuned:
        model = optimized(model)
    config = resolve_data_config({}, model=model)
    loader = create_loader(
        ImageDataset(options.images),
        batch_size=BATCH_SIZE,
        use_prefetcher=False,
        num_workers=1 if options.tuned else 2,
        device=torch.device("cpu"),
        input_size=config["input_size"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
    )
    found: list[int] = []
    with torch.inference_mode():
        for images, _ in loader:
            found += model(suited(images, model)).argmax(dim=1).tolist()
            tell(len(images))
    names = loader.dataset.filenames(basename=False)
    pq.write_table(pa.table({"path": names, "index": found}), options.output)


if __name__ == "__main__":
    main()
