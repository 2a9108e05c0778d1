"""The pipeline of `catsdogs score` without what makes it safe: no plan, lease, child process, parts, records or proof.

Reading, decoding and the model are the same code; `write_parquet` writes what comes.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray.data

from catsdogs import checkpoint, data, storage
from catsdogs.config import ScoreConfig
from catsdogs.data import decode as decoding
from catsdogs.data.sandbox import Answer, Decoder, File
from catsdogs.schema import FILES
from catsdogs.score.classify import ClassifyOptions, classified


def decode_here(decoder: Decoder, files: Sequence[File]) -> list[Answer]:
    """Decode in this process."""
    answers = []
    for file in files:
        began = time.perf_counter()
        decoded = decoder.decode(file.image_bytes, file.row)
        if decoded.image is not None:
            file.pixels[:] = decoded.image
        seconds = time.perf_counter() - began
        answers.append(Answer(decoded.status, decoded.error, decoded.width, decoded.height, seconds))
    return answers


@dataclass(frozen=True)
class DecodeHere(data.DecodeForInference):
    """The decoding stage, in the process of its task."""

    def __call__(self, files: pa.Table) -> pa.Table:
        """Read and decode one block of files."""
        vars(decoding)["decode_apart"] = decode_here
        return super().__call__(files)


def main() -> None:
    """Run the pipeline once."""
    parser = argparse.ArgumentParser()
    for flag in ("--input", "--checkpoint", "--output"):
        parser.add_argument(flag, required=True)
    options = parser.parse_args()
    config = ScoreConfig(input=options.input, checkpoint=options.checkpoint, output=options.output)
    model = checkpoint.load(config.checkpoint)
    entries = list(storage.Listing(storage.absolute(config.input)))
    columns = [[getattr(entry, name) for entry in entries] for name in ("path", "size_bytes", "version")]
    blocks = data.inference_batches(pa.table(columns, schema=FILES), config.batch_size)
    data.start_ray()
    classify = ClassifyOptions.of(config, model)
    stage = DecodeHere(model.preprocessing, config.max_pixels)
    decoded = data.decode_blocks(ray.data.from_arrow(blocks), stage, classify.share.decode)
    classified(decoded, classify).write_parquet(options.output)


if __name__ == "__main__":
    main()
