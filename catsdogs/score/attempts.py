"""Attempts to predict and write (stages 2 to 4), until the input is listed and no shard is pending.

An attempt ends when all its rows have arrived, or at a failure of Ray or a machine. The next one has the shards that
are pending then: those that are incomplete, and those that were listed meanwhile.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa

from catsdogs import ray_metrics
from catsdogs.errors import RunError
from catsdogs.progress import Message, Progress
from catsdogs.ray_errors import RetryableError, unwrap_ray_error
from catsdogs.score.background import BackgroundListing
from catsdogs.score.parts import PartWriter
from catsdogs.score.plan import PendingShard, Plan
from catsdogs.score.run_files import RunStats, record_environment

logger = logging.getLogger(__name__)
MAX_ATTEMPTS_WITHOUT_COMMIT = 3  # in a row

# Yields the rows of the files of shards, in any order: the columns of the output, PASSTHROUGH_COLUMNS,
# `device_precision` and `model_s`.
Predict = Callable[[Sequence[PendingShard]], Iterator[pa.Table]]


def score_pending_shards(
    pending: Mapping[int, PendingShard],
    listing: BackgroundListing,
    predict: Predict,
    writer: PartWriter,
    stats: RunStats,
    progress: Progress,
) -> None:
    """Predict and write until the input is listed and no shard is pending.

    RunError if several attempts in a row finished no part.
    """
    num_failures: Counter[int] = Counter()  # attempts that left a shard incomplete: it goes last in the next
    attempts_without_commit = 0
    reason = ""  # why shards of the last attempt are pending
    while pending:
        if not reason:
            _report_pending(writer.plan, pending, listing.is_finished, progress)
        num_committed = writer.num_committed
        order = sorted(pending, key=lambda shard: (num_failures[shard], shard))
        reason = _attempt({shard: pending[shard] for shard in order}, listing, predict, writer, stats, progress)
        for shard, tables in writer.drop_incomplete().items():
            num_failures[shard] += 1
            for rows in tables:
                stats.remove(rows)
        attempts_without_commit = 0 if writer.num_committed > num_committed else attempts_without_commit + 1
        if attempts_without_commit == MAX_ATTEMPTS_WITHOUT_COMMIT:
            raise RunError(f"{attempts_without_commit} attempts in a row finished no part, the last one: {reason}")
        if writer.num_committed - num_committed == len(pending):
            reason = ""
        pending = listing.wait_for_shards(writer, is_retry=bool(reason))
        if pending and reason:
            progress(Message(f"{reason}: trying again, {len(pending)} parts are pending"))


def _report_pending(plan: Plan, pending: Mapping[int, PendingShard], is_listed: bool, progress: Progress) -> None:
    num_files = sum(shard.num_rows for shard in pending.values())
    num_parts = len(plan.sizes)
    finished = f", {num_parts - len(pending)} of {num_parts} parts are finished" if len(pending) < num_parts else ""
    so_far = "" if is_listed else " so far; the listing continues"
    progress(Message(f"{num_files:,} of {plan.num_files:,} files to score{finished}{so_far}"))


def _attempt(
    pending: Mapping[int, PendingShard],
    listing: BackgroundListing,
    predict: Predict,
    writer: PartWriter,
    stats: RunStats,
    progress: Progress,
) -> str:
    """Predict and write once; return the reason for missing rows, which counts only if shards remain pending."""
    num_left, num_files = sum(shard.num_rows for shard in pending.values()), writer.plan.num_files
    try:
        for rows in _unwrap_errors(predict, [*pending.values()]):
            seen = set(stats.by_device_precision)
            if not seen:
                _record_environment(rows, writer, progress)
            stats.add(rows)
            ray_metrics.count_scored_rows(writer.plan.output, rows)
            writer.add(rows, pending)
            num_left -= rows.num_rows
            for device_precision in stats.by_device_precision.keys() - seen:
                progress(Message(f"classifying on {device_precision}"))
            listing.check()
            progress(stats.report(num_left, num_files, "" if listing.is_finished else "listed so far"))
    except RetryableError as failure:
        return str(failure)
    return "rows are missing"


def _record_environment(rows: pa.Table, writer: PartWriter, progress: Progress) -> None:
    """Record how the first rows of this command were computed, before a part has them."""
    output = writer.plan.output
    changes = record_environment(output, rows["device_precision"][0].as_py(), writer.lease)
    if changes:
        progress(Message(f"results may differ slightly from those of the parts in {output}: {changes}"))


def _unwrap_errors(predict: Predict, shards: Sequence[PendingShard]) -> Iterator[pa.Table]:
    """Predict, and unwrap the exceptions of stages 2 and 3: only these can be retryable."""
    try:
        yield from predict(shards)
    except Exception as error:
        logger.debug("an attempt failed", exc_info=True)
        cause = unwrap_ray_error(error)
        raise cause from (error.__cause__ if cause is error else None)
