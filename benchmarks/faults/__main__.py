"""Run the fault table, or resume it: results are kept in .faults/, and docs/faults.md is written after each row."""

import argparse
import contextlib
import queue
import random
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.faults import oracle
from benchmarks.faults.cost import measure_cost
from benchmarks.faults.inputs import Inputs, N
from benchmarks.faults.page import write_page
from benchmarks.faults.planning import measure_planning
from benchmarks.faults.processes import stop_commands
from benchmarks.faults.reads import OpenCounter
from benchmarks.faults.results import Result, Results
from benchmarks.faults.scenarios import Scenario, list_scenarios
from benchmarks.faults.store import Store
from benchmarks.faults.trial import OURS, Trial, run_limited

USUAL_S = 30.0  # of a run, before one without faults was measured
MEASUREMENTS = {"planning": measure_planning, "cost": measure_cost}  # after the table, with nothing else running
NUM_CONCURRENT = 2  # runs, also of the baselines
MAX_CONCURRENT = 5  # runs of a scenario that never ends before its time limit
BASELINES = {"disk": "none", "s3": "none, on S3", "cluster": "none, on a cluster"}


@dataclass(frozen=True)
class Slot:
    """The resources of one run at a time: a folder of images whose reads are counted, and an S3 server if needed."""

    images: Path
    store: Store | None


class Table:
    """Runs what is missing of the fault table, and writes its page."""

    def __init__(self, work: Path, page: Path) -> None:
        self._work = work
        self._page = page
        self._inputs = Inputs(work)
        self._results = Results(work)
        self._lock = threading.Lock()
        self._revision = _git("rev-parse", "--short", "HEAD") + (
            "-dirty" if _git("status", "--porcelain", "catsdogs", "benchmarks") else ""
        )
        self.scenarios = list_scenarios(self._inputs)

    def run(self, only: str, pipelines: list[str]) -> None:
        """Run everything that is missing of the rows whose name contains `only`, pipeline by pipeline."""
        for pipeline in pipelines:
            chosen = [s for s in self.scenarios if only in s.name and pipeline in s.pipelines]
            for place in BASELINES:
                rows = [s for s in chosen if s.place == place and self._missing(s, pipeline)]
                self._run_place(place, pipeline, rows)

    def _run_place(self, place: str, pipeline: str, rows: list[Scenario]) -> None:
        with contextlib.ExitStack() as stack:
            slots: list[Slot] = []
            for scenario in rows:
                num_slots = MAX_CONCURRENT if scenario.never_ends and pipeline != OURS else NUM_CONCURRENT
                slots += [self._open_slot(stack, place, i) for i in range(len(slots), num_slots)]
                self._run_row(scenario, pipeline, slots[:num_slots])

    def write(self) -> None:
        """Write docs/faults.md from the results so far, and the results beside it."""
        write_page(self._page, self.scenarios, self._results, BASELINES)
        self._results.copy_to(self._page.with_suffix(".jsonl"))

    def _missing(self, scenario: Scenario, pipeline: str) -> list[int]:
        done = {result.run for result in self._results.find(scenario.name, pipeline)}
        if scenario.name == BASELINES["disk"] and self._results.reference(pipeline) is None:
            done = set()  # the reference is taken from its rows
        return [run for run in range(scenario.num_runs(pipeline)) if run not in done]

    def _open_slot(self, stack: contextlib.ExitStack, place: str, number: int) -> Slot:
        images = self._inputs.link_images(f"images-{number}")
        return Slot(images, stack.enter_context(Store(images)) if place == "s3" else None)

    def _run_row(self, scenario: Scenario, pipeline: str, slots: list[Slot]) -> None:
        free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            free.put(slot)

        def run_in_free_slot(run: int) -> None:
            slot = free.get()
            try:
                self._run_once(scenario, pipeline, run, slot)
            finally:
                free.put(slot)

        with ThreadPoolExecutor(len(slots)) as pool:
            try:
                list(pool.map(run_in_free_slot, self._missing(scenario, pipeline)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                stop_commands()
                raise
        self.write()

    def _run_once(self, scenario: Scenario, pipeline: str, run: int, slot: Slot) -> None:
        if slot.store:
            slot.store.proxy.reset()
        trial = Trial(
            pipeline=pipeline,
            inputs=self._inputs,
            images=slot.images,
            folder=self._work / "runs" / re.sub(r"\W+", "-", f"{scenario.name} {pipeline} {run}"),
            store=slot.store,
            rng=random.Random(f"{scenario.name} {pipeline} {run}"),
            usual_s=self._results.wall_s(BASELINES[scenario.place], pipeline) or USUAL_S,
            usual_bytes=(self._results.reference(pipeline) or ({}, 0))[1],
        )
        with OpenCounter(slot.images) as counter:
            was_cut = run_limited(scenario.run, trial)
        images_read = counter.num_opens
        if slot.store:
            counts = slot.store.proxy.counts
            images_read = counts.by_kind["image"]
            trial.injected = trial.injected or counts.injected.total()
        with self._lock:
            self._judge(scenario, trial, run, was_cut, images_read)
        trial.clear()

    def _judge(self, scenario: Scenario, trial: Trial, run: int, was_cut: bool, images_read: int) -> None:
        found = trial.read_output()
        reference = self._results.reference(trial.pipeline)
        if reference is None:
            assert scenario.name == BASELINES["disk"], f"run the row {BASELINES['disk']} first"
            self._results.save_reference(trial.pipeline, found.by_path(), found.num_bytes)
            reference = self._results.reference(trial.pipeline)
            assert reference is not None
        expected = scenario.expect(reference[0], trial.is_ours)
        verdict = oracle.judge(found, self._inputs.names, expected, trial.is_ours)
        result = Result(
            fault=scenario.name,
            pipeline=trial.pipeline,
            run=run,
            injected=trial.injected,
            lost=verdict.lost,
            doubled=verdict.doubled,
            wrong=verdict.wrong,
            images_read=images_read,
            wall_s=round(trial.wall_s, 2),
            codes=trial.codes,
            cut=was_cut,
            right=verdict.right and not trial.problems and not was_cut,
            problems=[*verdict.problems, *trial.problems, *verdict.wrong_rows],
            notes=trial.notes,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            revision=self._revision,
        )
        self._results.add(result)
        print(
            f"{scenario.name} | {trial.pipeline} {run}: {'right' if result.right else 'WRONG'} "
            f"lost {result.lost} doubled {result.doubled} wrong {result.wrong} read {images_read} of {N}, "
            f"{trial.wall_s:.1f} s, {trial.injected} injected, exits {trial.codes} {result.problems} {result.notes}",
            flush=True,
        )


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Run the parts of the table that the flags name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(".faults"), help="folder of the results, from which a table is resumed"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/faults.md"))
    parser.add_argument("--only", default="", help="rows whose name contains this; or `planning`; or `cost`")
    parser.add_argument("--pipelines", nargs="+", default=[], help="catsdogs, stock, ...; default: all")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results so far")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contexts end commands and stores
    work = options.work.resolve()
    work.mkdir(exist_ok=True)
    table = Table(work, options.page)
    if not options.page_only:
        all_pipelines = list(dict.fromkeys(pipeline for s in table.scenarios for pipeline in s.pipelines))
        table.run(options.only, options.pipelines or all_pipelines)
        for name, measure in MEASUREMENTS.items():
            if options.only in name and not options.pipelines:
                measure(work)
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
