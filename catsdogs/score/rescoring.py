"""`--retry-failed`: request that rows of finished parts with a retryable status are scored again."""

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from catsdogs import storage
from catsdogs.lease import LeaseClaim
from catsdogs.schema import RETRYABLE_STATUSES
from catsdogs.score.parts import read_records, read_tables
from catsdogs.score.plan import SUCCESS, Plan, build_files_table, part_name
from catsdogs.score.threads import map_in_threads

PART_READERS = 8  # threads that search parts for failed rows; a part is read whole


def request_rescore_of_failed_rows(plan: Plan, lease: LeaseClaim) -> None:
    """Request that the rows of finished parts with a retryable status are scored again."""
    finished = set(storage.list_names(plan.output))
    shards = [shard for shard in range(len(plan.sizes)) if part_name(shard) in finished]
    records = map_in_threads(lambda shard: read_records(plan.output, [shard])[0], shards)
    searched = (
        shard
        for shard, record in zip(shards, records, strict=True)
        if record is None or set(RETRYABLE_STATUSES) & set(record.by_status)
    )
    for _ in map_in_threads(partial(_request_rescore_of_part, plan, lease), searched, PART_READERS):
        pass


def _request_rescore_of_part(plan: Plan, lease: LeaseClaim, shard: int) -> None:
    rows = next(read_tables([plan.part_uri(shard)], ["path", "status"]))
    failed = rows.filter(pc.is_in(rows["status"], pa.array(RETRYABLE_STATUSES)))
    if failed.num_rows:
        lease.check()
        storage.remove(storage.join(plan.output, SUCCESS))
        files = build_files_table(map(storage.Entry, failed["path"].to_pylist()), shard)
        plan.request_rescore(shard, files, lease)
