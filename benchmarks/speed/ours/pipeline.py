"""Our pipeline without Ray: one thread reads and decodes, another runs the model and writes one Parquet file."""

import queue
import threading
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.protocol import BATCH_SIZE, parse_arguments
from catsdogs import data, storage
from catsdogs.checkpoint import read_checkpoint
from catsdogs.images import MAX_PIXELS
from catsdogs.predict import build_checked_predictor
from catsdogs.predictions import build_predictions
from catsdogs.process_setup import configure_threads_and_malloc
from catsdogs.schema import FILES

QUEUE_BATCHES = 4


def prefetch(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Compute batches in a thread, ahead of the caller."""
    ready: queue.Queue[pa.Table | None] = queue.Queue(QUEUE_BATCHES)

    def put_all() -> None:
        for batch in batches:
            ready.put(batch)
        ready.put(None)

    threading.Thread(target=put_all, daemon=True).start()
    while (batch := ready.get()) is not None:
        yield batch


def main() -> None:
    """Classify a folder."""
    options = parse_arguments()
    checkpoint = read_checkpoint(options.checkpoint)
    entries = list(storage.Listing(storage.absolute(options.images)))
    columns = [[getattr(entry, name) for entry in entries] for name in FILES.names]
    stage = data.DecodeForInference(checkpoint.preprocessing, MAX_PIXELS, BATCH_SIZE)
    configure_threads_and_malloc(1)
    predictor, _ = build_checked_predictor(
        checkpoint.load_state_dict(), checkpoint.preprocessing, "auto", torch.device("cpu")
    )
    predictions = []
    for rows in prefetch(stage(pa.table(columns, schema=FILES))):
        probs_NK = predictor(data.view_images(rows, checkpoint.preprocessing.img_size))
        predictions.append(build_predictions(rows, probs_NK, checkpoint.class_names))
        report_batch(rows.num_rows)
    pq.write_table(pa.concat_tables(predictions), options.output)


if __name__ == "__main__":
    main()
