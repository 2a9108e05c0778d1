"""Open shards -> rounds of labelling until none is open.

A round ends early where Ray gives up, such as when its nodes die faster than it retries. What was committed stays; the
next round takes what is open, those that did not get through last.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from catsdogs.errors import CatsdogsError, RunError
from catsdogs.progress import Message, Progress, StageProgress
from catsdogs.schema import OK
from catsdogs.score.lease import clock_s
from catsdogs.score.parts import PartWriter
from catsdogs.score.plan import PendingShard, Plan

MAX_ATTEMPTS_WITHOUT_PROGRESS = 3  # rounds in a row that commit nothing


class Scorer(Protocol):
    """Labels the files of manifests: rows of the output with what is carried beside them, in any order.

    `slots` says how many processes read and decode, and how many hold a model.
    """

    parallelism: dict[str, int]

    def __call__(self, uris: Sequence[str]) -> Iterator[pa.Table]:
        """Label; raises our own errors where going on is of no use, others where another round may help."""


class ScoringLoop:
    """Labels all open work of a plan; what it did can be read afterwards."""

    def __init__(
        self, plan: Plan, metadata: dict[str, str], check_lease: Callable[[], None], progress: Progress
    ) -> None:
        self._plan = plan
        self._metadata = metadata
        self._check_lease = check_lease
        self._progress = progress
        self._attempts: Counter[int] = Counter()
        self._began = clock_s()
        self.num_rows = 0
        self.retries = 0
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self.by_status: Counter[str] = Counter()
        self.by_device_precision: Counter[str] = Counter()

    def run(self, scorer: Scorer, pending: dict[int, PendingShard]) -> None:
        """Go on until no shard is open.

        Raises:
            RunError: several rounds in a row finished no part.
        """
        without_progress = 0
        while pending:
            num_committed, reason = self._attempt(scorer, pending)
            if num_committed == 0:
                without_progress += 1
            else:
                without_progress = 0
            if without_progress == MAX_ATTEMPTS_WITHOUT_PROGRESS:
                raise RunError(
                    f"scoring got stuck: {MAX_ATTEMPTS_WITHOUT_PROGRESS} times nothing was finished, at last because {reason}"
                )
            self._check_lease()
            pending = self._plan.pending_shards()
            if pending:
                self._progress(Message(f"{reason}: going on with {len(pending)} open parts"))

    def _attempt(self, scorer: Scorer, pending: dict[int, PendingShard]) -> tuple[int, str]:
        """Label once; how many parts were committed, and why the round ended."""
        collector = PartWriter(self._plan, pending, self._metadata, self._check_lease)
        reason, device_precisions = "rows are missing", set(self.by_device_precision)
        order = sorted(pending, key=lambda shard: (self._attempts[shard], shard))
        try:
            for rows in scorer([pending[shard].uri for shard in order]):
                collector.add(rows)
                for device_precision in collector.by_device_precision.keys() - device_precisions:
                    self._progress(Message(f"labelled by {device_precision}"))
                device_precisions |= collector.by_device_precision.keys()
                self._report(collector, pending)
        except CatsdogsError:
            raise
        except Exception as error:  # noqa: BLE001 whatever Ray raises: the next round may get through
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        self._attempts.update(collector.incomplete)
        collector.drop_incomplete()
        self.num_rows += collector.num_rows
        self.retries += collector.retries
        for stage, seconds in collector.busy_s.items():
            self.busy_s[stage] += seconds
        self.by_status.update(collector.by_status)
        self.by_device_precision.update(collector.by_device_precision)
        return collector.num_committed, reason

    def _report(self, collector: PartWriter, pending: dict[int, PendingShard]) -> None:
        left = sum(item.num_rows for item in pending.values()) - collector.num_rows
        rate = max(self.num_rows + collector.num_rows, 1) / max(clock_s() - self._began, 1e-9)
        by_status = self.by_status + collector.by_status
        retries = self.retries + collector.retries
        notes = [f"{rate:.1f} img/s"]
        notes += [f"{status} {count:,}" for status, count in sorted(by_status.items()) if status != OK]
        notes += [f"retries {retries:,}"] * bool(retries)
        notes += [f"ETA {left / rate:,.0f} s"]
        self._progress(StageProgress("score", self._plan.num_files - left, self._plan.num_files, "  ".join(notes)))
