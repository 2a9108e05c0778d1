"""List in a thread, so that shards are scored while a long listing continues.

What is listed and not scored yet is scored in waves, each a separate run of stages 2 to 4. Only shards of the saved
plan are scored: an interrupted listing overwrites the others. Rows of finished parts are scored again only when the
listing is finished, because until then it may request more of them.
"""

import time
from concurrent.futures import wait
from typing import Any, Self

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.lease import LeaseClaim
from catsdogs.progress import Progress
from catsdogs.score.listing import PlanUpdate
from catsdogs.score.parts import PartWriter
from catsdogs.score.plan import PendingShard, Plan

FIRST_WAVE_S = 10.0  # a listing that takes less is finished before anything is scored
WAVE_S = 120.0  # from a wave to the next, at least: each starts the models again, which takes 12 s on 2 cores


class BackgroundListing:
    """Updates a plan in a thread that ends with the `with` block, or at the next listed file.

    With `limit` or `retry_failed`, nothing is scored before the listing is finished.
    """

    def __init__(self, plan: Plan, config: ScoreConfig, lease: LeaseClaim, progress: Progress) -> None:
        self._update = PlanUpdate(plan, config, lease, progress)
        self._allows_waves = config.limit is None and not config.retry_failed
        self._start_s = time.monotonic()
        self.seconds = 0.0  # that the listing took
        self._next_wave_s = self._start_s + FIRST_WAVE_S

    def __enter__(self) -> Self:
        self._ended = storage.call_in_thread(self._run)
        return self

    def __exit__(self, *error: Any) -> None:
        self._update.__exit__(*error)

    @property
    def is_finished(self) -> bool:
        """Whether the input is listed."""
        return self._ended.done() and self._ended.exception() is None

    def check(self) -> None:
        """Raise the error of the listing if it failed."""
        if self._ended.done():
            self._ended.result()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the listing is finished, or for a time; raise its error if it failed."""
        wait([self._ended], timeout_s)
        self.check()

    def wait_for_shards(self, writer: PartWriter, is_retry: bool = False) -> dict[int, PendingShard]:
        """Wait until it is time for a wave; return its shards, or none if the input is listed and none is pending.

        Args:
            is_retry: shards of the last wave are pending, so that the next one begins at once.
        """
        while True:
            if self._allows_waves:
                self.wait(0.0 if is_retry else max(0.0, self._next_wave_s - time.monotonic()))
            else:
                self.wait()
            is_finished = self.is_finished  # before the plan is read
            pending = writer.pending_shards(with_rescores=is_finished)
            self._next_wave_s = time.monotonic() + (WAVE_S if pending else FIRST_WAVE_S)
            if pending or is_finished:
                return pending

    def _run(self) -> None:
        self._update.run()
        self.seconds = time.monotonic() - self._start_s
