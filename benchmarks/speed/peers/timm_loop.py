"""Inference as in timm's documentation: its configuration, loader and model; tuned: bf16, channels last."""

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from timm.data import ImageDataset, create_loader, resolve_data_config

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import optimize, to_model_input
from benchmarks.speed.protocol import parse_arguments

BATCH_SIZE = 32


def main() -> None:
    """Classify a folder."""
    options = parse_arguments()
    model: torch.nn.Module = timm.create_model(f"local-dir:{options.checkpoint}", pretrained=True).eval()
    if options.tuned:
        model = optimize(model)
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
    indices: list[int] = []
    with torch.inference_mode():
        for images, _ in loader:
            indices += model(to_model_input(images, model)).argmax(dim=1).tolist()
            report_batch(len(images))
    names = loader.dataset.filenames(basename=False)
    pq.write_table(pa.table({"path": names, "index": indices}), options.output)


if __name__ == "__main__":
    main()
