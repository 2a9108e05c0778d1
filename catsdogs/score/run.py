"""One scoring of an output, from its lease to `_SUCCESS`; who labels is given. No Ray.

What is durable at each moment, in this order: the lease, `_run.json`, the plan, the parts, the summary, `_SUCCESS`.
Any of it may be the last that a killed driver did; the same command goes on from there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from catsdogs import storage
from catsdogs.config import ScoreConfig
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Message, Progress
from catsdogs.score.audit import audit
from catsdogs.score.changes import PlanUpdate, rescore_failed
from catsdogs.score.lease import LEASE, Lease, clock_s
from catsdogs.score.parts import PartRecord
from catsdogs.score.plan import MANIFEST, RESCORE, RUN, STATS, SUCCESS, SUMMARY, PendingShard, Plan
from catsdogs.score.rounds import Scorer, ScoringLoop
from catsdogs.score.summary import summarize_costs, summarize_rows, versions, write_report

MAX_SHOWN_CHARS = 60  # characters of a setting in a message


@dataclass(frozen=True)
class RunSettings:
    """What every row of an output has in common: `settings` go to `_run.json`, `metadata` into each part."""

    settings: Mapping[str, Any]
    metadata: Mapping[str, str]


def run(config: ScoreConfig, run_settings: RunSettings, scorer: Scorer, progress: Progress) -> dict[str, Any]:
    """Bring an output up to date with its input; the content of `_summary.json`.

    Raises:
        InputError: the input or the output cannot be used.
        RunError: the run failed; finished parts are kept.
    """
    _check_output(config)
    try:
        with Lease(config.output, progress) as lease:
            _check_run_settings(config.output, run_settings)
            for folder in ((), (MANIFEST,), (STATS,), (MANIFEST, RESCORE)):
                storage.remove_temporaries(storage.join(config.output, *folder))
            return _Scoring(config, run_settings, lease, progress).run(scorer)
    except RunError as error:
        raise RunError(f"{error}; finished parts are kept in {config.output}, the same command goes on") from error


def _check_output(config: ScoreConfig) -> None:
    names = [name for name in storage.list_names(config.output) if not name.startswith((f".{LEASE}.", f".{RUN}."))]
    if names and not config.resume:
        raise InputError(f"--no-resume: expected an empty or new --output, found files in {config.output}")
    if names not in ([], [LEASE]) and RUN not in names:
        raise InputError(
            f"--output {config.output}: expected an empty or new folder, or an earlier scoring, found other files; "
            "choose another"
        )


def _check_run_settings(output: str, run_settings: RunSettings) -> None:
    """Write `_run.json`, or compare with the one that is there; before there is a plan nothing is bound to it.

    Raises:
        InputError: names what differs.
    """
    uri = storage.join(output, RUN)
    content = json.dumps(dict(run_settings.settings), indent=2).encode()
    settings = json.loads(content)
    found = storage.read_versioned(uri)
    if found is not None and found[0] == content:
        return
    begun = storage.list_names(storage.join(output, MANIFEST)) or "part-" in "".join(storage.list_names(output))
    if found is None or not begun:
        storage.write_bytes(uri, content)
        return
    try:
        before: dict[str, Any] = json.loads(found[0])
    except ValueError as error:
        raise InputError(f"{uri}: expected a record of catsdogs: {error}") from error
    differing = sorted(name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name))
    if differing:
        shown = "; ".join(
            f"{name}: {_short(before.get(name))} there, {_short(settings.get(name))} now" for name in differing
        )
        raise InputError(
            f"--output {output} holds a scoring of another kind: {shown}; repeat its settings, or give another --output"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


class _Scoring:
    """One command's work on an output that it holds the lease of."""

    def __init__(self, config: ScoreConfig, run_settings: RunSettings, lease: Lease, progress: Progress) -> None:
        self._config = config
        self._identity = run_settings
        self._lease = lease
        self._progress = progress
        self._began = clock_s()
        self._stage_s: dict[str, float] = {}

    def run(self, scorer: Scorer) -> dict[str, Any]:
        """Plan, label, prove, and say so."""
        plan = Plan.load(self._config.output)
        pending = self._find_pending_shards(plan)
        if not pending and self._succeeded():
            self._progress(Message(f"nothing to do: every listed file has its row in {self._config.output}"))
            found = storage.read_bytes(storage.join(self._config.output, SUMMARY))
            summary: dict[str, Any] = json.loads(found)
            return summary
        self._lease.check()
        storage.remove(storage.join(self._config.output, SUCCESS))
        rounds = ScoringLoop(plan, dict(self._identity.metadata), self._lease.check, self._progress)
        rounds.run(scorer, pending)
        return self._finish(plan, rounds, scorer.parallelism)

    def _succeeded(self) -> bool:
        return storage.read_versioned(storage.join(self._config.output, SUCCESS)) is not None

    def _find_pending_shards(self, plan: Plan) -> dict[int, PendingShard]:
        """List what is to be listed; find what is to be labelled."""
        is_resumed = plan.listing_cursor is None and bool(plan.sizes)
        if not is_resumed or plan.relisting or (self._succeeded() and not self._config.retry_failed):
            PlanUpdate(plan, self._config, self._progress, self._lease.check).run()
        self._stage_s["list"] = clock_s() - self._began
        if not plan.sizes:
            raise InputError(
                f"no images under {self._config.input}: looked for {' '.join(storage.EXTENSIONS)}; check --input"
            )
        if self._config.retry_failed:
            rescore_failed(plan, self._lease.check)
        self._lease.check()
        pending = plan.pending_shards()
        if pending:
            rows = sum(item.num_rows for item in pending.values())
            done = f", {len(plan.sizes) - len(pending)} of {len(plan.sizes)} parts are there" if is_resumed else ""
            self._progress(Message(f"{rows:,} of {plan.num_files:,} files to score{done}"))
        return pending

    def _finish(self, plan: Plan, rounds: ScoringLoop, parallelism: Mapping[str, int]) -> dict[str, Any]:
        """Prove that nothing is lost or doubled, then say so."""
        totals = audit(plan, self._progress, self._rewrite_stats)
        for stage in ("read", "decode", "model", "write"):
            self._stage_s[stage] = rounds.busy_s[stage] / parallelism.get(stage, 1)
        summary = (
            summarize_rows(plan, totals, self._identity.settings["class_names"])
            | summarize_costs(rounds.num_rows, clock_s() - self._began, rounds.retries, self._stage_s)
            | {"device_precisions": dict(sorted(rounds.by_device_precision.items())), "versions": versions()}
            | {"model_sha256": self._identity.settings["model_sha256"]}
        )
        output = self._config.output
        self._lease.check()
        storage.write_bytes(storage.join(output, SUMMARY), json.dumps(summary, indent=2).encode())
        write_report(self._config, summary, totals)
        self._lease.check()
        storage.write_bytes(storage.join(output, SUCCESS), b"")
        return summary

    def _rewrite_stats(self, record: PartRecord) -> None:
        """Write the record of a part that a driver committed last before it died."""
        self._lease.check()
        record.write(self._config.output)
