"""Open shards -> rounds of labelling until none is open.

A round ends early where Ray gives up, such as when its nodes die faster than it retries. What was committed stays; the
next round takes what is open, those that did not get through last.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from catsdogs.errors import CatsdogsError, RunError
from catsdogs.progress import Message, Progress, Step
from catsdogs.schema import OK
from catsdogs.score.lease import clock_s
from catsdogs.score.parts import Collector
from catsdogs.score.plan import Plan, Work

MAX_FRUITLESS = 3  # rounds in a row that commit nothing


class Labeller(Protocol):
    """Labels the files of manifests: rows of the output with what is carried beside them, in any order.

    `slots` says how many processes read and decode, and how many hold a model.
    """

    slots: dict[str, int]

    def __call__(self, uris: Sequence[str]) -> Iterator[pa.Table]:
        """Label; raises our own errors where going on is of no use, others where another round may help."""


class Rounds:
    """Labels all open work of a plan; what it did can be read afterwards."""

    def __init__(self, plan: Plan, metadata: dict[str, str], guard: Callable[[], None], progress: Progress) -> None:
        self._plan = plan
        self._metadata = metadata
        self._guard = guard
        self._progress = progress
        self._tries: Counter[int] = Counter()
        self._began = clock_s()
        self.num_rows = 0
        self.retries = 0
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self.by_status: Counter[str] = Counter()
        self.by_engine: Counter[str] = Counter()

    def run(self, label: Labeller, work: dict[int, Work]) -> None:
        """Go on until no shard is open.

        Raises:
            RunError: several rounds in a row finished no part.
        """
        fruitless = 0
        while work:
            num_committed, reason = self._round(label, work)
            if num_committed == 0:
                fruitless += 1
            else:
                fruitless = 0
            if fruitless == MAX_FRUITLESS:
                raise RunError(
                    f"scoring got stuck: {MAX_FRUITLESS} times nothing was finished, at last because {reason}"
                )
            self._guard()
            work = self._plan.open_work()
            if work:
                self._progress(Message(f"{reason}: going on with {len(work)} open parts"))

    def _round(self, label: Labeller, work: dict[int, Work]) -> tuple[int, str]:
        """Label once; how many parts were committed, and why the round ended."""
        collector = Collector(self._plan, work, self._metadata, self._guard)
        reason, engines = "rows are missing", set(self.by_engine)
        order = sorted(work, key=lambda shard: (self._tries[shard], shard))
        try:
            for rows in label([work[shard].uri for shard in order]):
                collector.add(rows)
                for engine in collector.by_engine.keys() - engines:
                    self._progress(Message(f"labelled by {engine}"))
                engines |= collector.by_engine.keys()
                self._tell(collector, work)
        except CatsdogsError:
            raise
        except Exception as error:  # noqa: BLE001 whatever Ray raises: the next round may get through
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        self._tries.update(collector.waiting)
        collector.forget_waiting()
        self.num_rows += collector.num_rows
        self.retries += collector.retries
        for stage, seconds in collector.busy_s.items():
            self.busy_s[stage] += seconds
        self.by_status.update(collector.by_status)
        self.by_engine.update(collector.by_engine)
        return collector.num_committed, reason

    def _tell(self, collector: Collector, work: dict[int, Work]) -> None:
        left = sum(item.num_rows for item in work.values()) - collector.num_rows
        rate = max(self.num_rows + collector.num_rows, 1) / max(clock_s() - self._began, 1e-9)
        by_status = self.by_status + collector.by_status
        retries = self.retries + collector.retries
        notes = [f"{rate:.1f} img/s"]
        notes += [f"{status} {count:,}" for status, count in sorted(by_status.items()) if status != OK]
        notes += [f"retries {retries:,}"] * bool(retries)
        notes += [f"ETA {left / rate:,.0f} s"]
        self._progress(Step("score", self._plan.num_files - left, self._plan.num_files, "  ".join(notes)))
