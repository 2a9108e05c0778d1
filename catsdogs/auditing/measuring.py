"""Read and measure the files of the sets with Ray Data: one row for every file, in the order of the listing."""

import tempfile
import time

import numpy as np
import pyarrow as pa

from catsdogs import data
from catsdogs.auditing.row_file import RowFile
from catsdogs.auditing.sets import AuditedSets, MeasuredFiles
from catsdogs.images import MAX_PIXELS, Preprocessing
from catsdogs.progress import Progress, StageProgress, StallReporter
from catsdogs.ray_errors import to_run_error
from catsdogs.schema import FILES

BATCH_SIZE = 64  # files that are decoded with one time limit


def measure_files(sets: AuditedSets, progress: Progress) -> MeasuredFiles:
    """Read each file once and measure its image.

    Raises:
        RunError: Ray or a machine failed.
    """
    started = time.perf_counter()
    listed = pa.concat_tables([sets.files, sets.against])
    numbered = listed.select(FILES.names).append_column("row", pa.array(np.arange(len(listed))))
    with tempfile.TemporaryFile(prefix="catsdogs-") as file:
        rows = RowFile(file, len(listed))
        _run_stage(numbered, rows, progress)
        files = rows.read().drop_columns(["row", "read_s", "decode_s"])
    for name in ("label", "split", "group"):
        files = files.append_column(name, listed[name])
    return MeasuredFiles(files, len(sets.files), time.perf_counter() - started)


def _run_stage(files: pa.Table, rows: RowFile, progress: Progress) -> None:
    stage = data.DecodeForAudit(Preprocessing(), MAX_PIXELS, BATCH_SIZE)
    num_cpus = data.allocate_cpus(0).decode
    num_rows = 0
    try:
        measured = data.read_and_decode(files, stage, num_cpus)
        measured.set_name("audit")  # in Ray's dashboard
        blocks = measured.iter_batches(batch_size=None, batch_format="pyarrow")
        stalls = StallReporter(progress, lambda: data.describe_wait("the decoding tasks", 0))
        with data.quiet_ray_loggers(), data.without_cluster_actors(), stalls:
            table: pa.Table
            for table in stalls.watch(blocks):
                rows.add(table)
                num_rows += table.num_rows
                progress(StageProgress("audit", num_rows, files.num_rows))
    except Exception as error:  # noqa: BLE001 - `cause` is raised
        cause = to_run_error(error, "the audit", "nothing was written")
        raise cause from (error.__cause__ if cause is error else None)
