"""Our pipeline without Ray: a thread reads and decodes ahead of the model, one process writes one Parquet file."""

import queue
import threading
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.speed.peers.common import arguments, tell
from catsdogs import checkpoint, data, storage
from catsdogs.images import MAX_PIXELS
from catsdogs.predict import BATCH_SIZE, build_checked_predictor, build_predictions, configure_threads_and_malloc
from catsdogs.schema import FILES

AHEAD = 4  # batches


def ahead(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Make batches in a thread."""
    made: queue.Queue[pa.Table | None] = queue.Queue(AHEAD)

    def make() -> None:
        for batch in batches:
            made.put(batch)
        made.put(None)

    threading.Thread(target=make, daemon=True).start()
    while (batch := made.get()) is not None:
        yield batch


def main() -> None:
    """Label a folder."""
    options = arguments()
    model = checkpoint.load(options.checkpoint)
    entries = list(storage.Listing(storage.absolute(options.images)))
    columns = [[getattr(entry, name) for entry in entries] for name in FILES.names]
    stage = data.DecodeForInference(model.preprocessing, MAX_PIXELS, BATCH_SIZE)
    configure_threads_and_malloc(1)
    predictor, _ = build_checked_predictor(model.model, model.preprocessing, "auto", torch.device("cpu"))
    labelled = []
    for rows in ahead(stage(pa.table(columns, schema=FILES))):
        probs_NK = predictor(data.view_images(rows, model.preprocessing.img_size))
        labelled.append(build_predictions(rows, probs_NK, model.class_names))
        tell(rows.num_rows)
    pq.write_table(pa.concat_tables(labelled), options.output)


if __name__ == "__main__":
    main()
