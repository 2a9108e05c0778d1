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
from catsdogs.score.changes import Relisting, redo_failed
from catsdogs.score.lease import LEASE, Lease, clock_s
from catsdogs.score.parts import PartRecord
from catsdogs.score.plan import MANIFEST, REDO, RUN, STATS, SUCCESS, SUMMARY, Plan, Work
from catsdogs.score.rounds import Labeller, Rounds
from catsdogs.score.show import costs_of, totals_of, versions, write_report

LONGEST_SHOWN = 60  # characters of a setting in a message


@dataclass(frozen=True)
class Identity:
    """What every row of an output has in common: `settings` go to `_run.json`, `metadata` into each part."""

    settings: Mapping[str, Any]
    metadata: Mapping[str, str]


def run(config: ScoreConfig, identity: Identity, label: Labeller, progress: Progress) -> dict[str, Any]:
    """Bring an output up to date with its input; the content of `_summary.json`.

    Raises:
        InputError: the input or the output cannot be used.
        RunError: the run failed; finished parts are kept.
    """
    _check_output(config)
    try:
        with Lease(config.output, progress) as lease:
            _check_identity(config.output, identity)
            for folder in ((), (MANIFEST,), (STATS,), (MANIFEST, REDO)):
                storage.remove_temporaries(storage.join(config.output, *folder))
            return _Scoring(config, identity, lease, progress).run(label)
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


def _check_identity(output: str, identity: Identity) -> None:
    """Write `_run.json`, or compare with the one that is there; before there is a plan nothing is bound to it.

    Raises:
        InputError: names what differs.
    """
    uri = storage.join(output, RUN)
    content = json.dumps(dict(identity.settings), indent=2).encode()
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
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


class _Scoring:
    """One command's work on an output that it holds the lease of."""

    def __init__(self, config: ScoreConfig, identity: Identity, lease: Lease, progress: Progress) -> None:
        self._config = config
        self._identity = identity
        self._lease = lease
        self._progress = progress
        self._began = clock_s()
        self._stage_s: dict[str, float] = {}

    def run(self, label: Labeller) -> dict[str, Any]:
        """Plan, label, prove, and say so."""
        plan = Plan.load(self._config.output)
        work = self._open_work(plan)
        if not work and self._succeeded():
            self._progress(Message(f"nothing to do: every listed file has its row in {self._config.output}"))
            found = storage.read_bytes(storage.join(self._config.output, SUMMARY))
            summary: dict[str, Any] = json.loads(found)
            return summary
        self._lease.check()
        storage.remove(storage.join(self._config.output, SUCCESS))
        rounds = Rounds(plan, dict(self._identity.metadata), self._lease.check, self._progress)
        rounds.run(label, work)
        return self._finish(plan, rounds, label.slots)

    def _succeeded(self) -> bool:
        return storage.read_versioned(storage.join(self._config.output, SUCCESS)) is not None

    def _open_work(self, plan: Plan) -> dict[int, Work]:
        """List what is to be listed; find what is to be labelled."""
        going_on = plan.listed_to is None and bool(plan.sizes)
        if not going_on or plan.relisting or (self._succeeded() and not self._config.retry_failed):
            Relisting(plan, self._config, self._progress, self._lease.check).run()
        self._stage_s["list"] = clock_s() - self._began
        if not plan.sizes:
            raise InputError(
                f"no images under {self._config.input}: looked for {' '.join(storage.EXTENSIONS)}; check --input"
            )
        if self._config.retry_failed:
            redo_failed(plan, self._lease.check)
        self._lease.check()
        work = plan.open_work()
        if work:
            rows = sum(item.num_rows for item in work.values())
            done = f", {len(plan.sizes) - len(work)} of {len(plan.sizes)} parts are there" if going_on else ""
            self._progress(Message(f"{rows:,} of {plan.num_files:,} files to score{done}"))
        return work

    def _finish(self, plan: Plan, rounds: Rounds, slots: Mapping[str, int]) -> dict[str, Any]:
        """Prove that nothing is lost or doubled, then say so."""
        totals = audit(plan, self._progress, self._mend)
        for stage in ("read", "decode", "model", "write"):
            self._stage_s[stage] = rounds.busy_s[stage] / slots.get(stage, 1)
        summary = (
            totals_of(plan, totals, self._identity.settings["class_names"])
            | costs_of(rounds.num_rows, clock_s() - self._began, rounds.retries, self._stage_s)
            | {"engines": dict(sorted(rounds.by_engine.items())), "versions": versions()}
            | {"model_sha256": self._identity.settings["model_sha256"]}
        )
        output = self._config.output
        self._lease.check()
        storage.write_bytes(storage.join(output, SUMMARY), json.dumps(summary, indent=2).encode())
        write_report(self._config, summary, totals)
        self._lease.check()
        storage.write_bytes(storage.join(output, SUCCESS), b"")
        return summary

    def _mend(self, record: PartRecord) -> None:
        """Write the record of a part that a driver committed last before it died."""
        self._lease.check()
        record.write(self._config.output)
