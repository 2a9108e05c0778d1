"""The pipeline of `catsdogs score` without what makes it safe: no plan, lease, child process, parts, records or proof.

Reading, decoding and the model are the same code; the driver writes what comes, so many rows a file.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import data, saved, storage
from catsdogs.classify import ClassifyOptions, add_classifier
from catsdogs.config import ScoreConfig
from catsdogs.data import decode as decoding
from catsdogs.data.sandbox import Decoder, DecodeRequest, DecodeResult
from catsdogs.schema import FILES
from catsdogs.start import start_ray

ROWS_PER_FILE = 10_000


def decode_here(decoder: Decoder, files: Sequence[DecodeRequest]) -> list[DecodeResult]:
    """Decode in this process."""
    answers = []
    for file in files:
        began = time.perf_counter()
        decoded = decoder.decode(file.image_bytes, file.row)
        if decoded.image is not None:
            file.pixels[:] = decoded.image
        seconds = time.perf_counter() - began
        answers.append(DecodeResult(decoded.status, decoded.error, decoded.width, decoded.height, seconds))
    return answers


@dataclass(frozen=True)
class DecodeHere(data.DecodeForInference):
    """The decoding stage, in the process of its task."""

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Read and decode one block of files."""
        vars(decoding)["decode_in_subprocess"] = decode_here
        return super().__call__(files)


def write(batches: Iterable[pa.Table], folder: Path) -> None:
    """Write rows as they come."""
    folder.mkdir()
    waiting: list[pa.Table] = []
    numbers = itertools.count()
    for batch in itertools.chain(batches, [None]):
        if batch is not None:
            waiting.append(batch)
        if waiting and (batch is None or sum(table.num_rows for table in waiting) >= ROWS_PER_FILE):
            pq.write_table(pa.concat_tables(waiting), folder / f"{next(numbers):05d}.parquet")
            waiting = []


def main() -> None:
    """Run the pipeline once."""
    parser = argparse.ArgumentParser()
    for flag in ("--input", "--checkpoint", "--output"):
        parser.add_argument(flag, required=True)
    options = parser.parse_args()
    config = ScoreConfig(input=options.input, checkpoint=options.checkpoint, output=options.output)
    model = saved.read(config.checkpoint)
    entries = list(storage.Listing(storage.absolute(config.input)))
    columns = [[getattr(entry, name) for entry in entries] for name in ("path", "size_bytes", "version")]
    files = pa.table(columns, schema=FILES)
    start_ray()
    classify = ClassifyOptions.from_config(config, model)
    stage = DecodeHere(model.preprocessing, config.max_pixels, config.batch_size)
    decoded = data.read_and_decode(files, stage, classify.cpus.decode)
    labelled = add_classifier(decoded, stage, classify)
    write(labelled.iter_batches(batch_size=None, batch_format="pyarrow"), Path(options.output))


if __name__ == "__main__":
    main()
