"""The pipeline of `catsdogs score` without its safety: no plan, lease, child process, parts, records or audit.

The stages, their batches and the decoder are those of `score`. It decodes in the process of the Ray task, and the
driver writes rows as they arrive.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs import data, storage
from catsdogs.checkpoint import read_checkpoint
from catsdogs.classify import ClassifyOptions, add_classifier, iter_predictions
from catsdogs.config import ScoreConfig
from catsdogs.data import decode
from catsdogs.data.decode_messages import Decoder, DecodeRequest, DecodeResult
from catsdogs.images.decode import import_decoders
from catsdogs.schema import FILES, parquet_bytes
from catsdogs.start import start_ray

ROWS_PER_FILE = 10_000  # as `--shard-size`


def decode_in_process(decoder: Decoder, requests: Sequence[DecodeRequest], _: object = None) -> list[DecodeResult]:
    """Decode files in this process, in place of `decode_in_subprocess`."""
    results = []
    for request in requests:
        start = time.perf_counter()
        decoded = decoder.decode(request.image_bytes, request.row)
        if decoded.image is not None:
            request.pixels[:] = decoded.image
        decode_s = time.perf_counter() - start
        results.append(DecodeResult(decoded.status, decoded.error, decoded.width, decoded.height, decode_s))
    return results


@dataclass(frozen=True)
class DecodeInProcess(data.DecodeForInference):
    """The decoding stage of `score`, without its child process."""

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        """Read and decode one block of files."""
        import_decoders()  # as the child process of `score` does
        with mock.patch.object(decode, "decode_in_subprocess", decode_in_process):
            yield from super().__call__(files)


def write_rows(batches: Iterable[pa.Table], folder: Path) -> None:
    """Write rows as they arrive, `ROWS_PER_FILE` to a file."""
    numbers = itertools.count()
    pending: list[pa.Table] = []
    for batch in batches:
        pending.append(batch)
        if sum(table.num_rows for table in pending) >= ROWS_PER_FILE:
            _write(pending, folder, next(numbers))
            pending = []
    if pending:
        _write(pending, folder, next(numbers))


def _write(tables: list[pa.Table], folder: Path, number: int) -> None:
    pq.write_table(pa.concat_tables(tables), folder / f"{number:05d}.parquet")


def main() -> None:
    """Score a folder once."""
    parser = argparse.ArgumentParser()
    for flag in ("--input", "--checkpoint", "--output"):
        parser.add_argument(flag, required=True)
    arguments = parser.parse_args()
    config = ScoreConfig(input=arguments.input, checkpoint=arguments.checkpoint, output=arguments.output)
    checkpoint = read_checkpoint(config.checkpoint)
    entries = list(storage.Listing(storage.absolute(config.input)))
    columns = [[getattr(entry, name) for entry in entries] for name in ("path", "size_bytes", "version")]
    files = pa.table(columns, schema=FILES)
    start_ray()
    options = ClassifyOptions.from_config(config, checkpoint, allow_gpu_jpegs=True)
    stage = options.build_decode_stage(config.max_pixels)
    stage = DecodeInProcess(**vars(stage))
    manifest = f"{config.output}/_files.parquet"
    storage.write_bytes(manifest, parquet_bytes(files))
    decoded = data.read_and_decode_manifests({manifest: files.num_rows}, stage, options.cpus.decode)
    predictions = add_classifier(decoded, stage, options)
    with data.quiet_ray_loggers(), data.without_cluster_actors():
        write_rows(iter_predictions(predictions, "score"), Path(config.output))


if __name__ == "__main__":
    main()
