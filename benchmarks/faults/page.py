"""The runs that are there -> docs/faults.md."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.faults.cost import BARE, NUM_IMAGES, SAFE, read_cost
from benchmarks.faults.inputs import N, is_bad
from benchmarks.faults.planning import NUM_SHARDS, SHARD_SIZE, read_planning
from benchmarks.faults.results import Result, Results
from benchmarks.faults.scenarios import Scenario
from benchmarks.faults.trial import CUT_S, MAX_COMMANDS, OURS
from benchmarks.machine import machine

INTRODUCTION = """# Faults

What `catsdogs score` loses, doubles and gets wrong when machines, networks and disks misbehave, and what the pipeline
that Ray's documentation shows does in the same rig. Made by `make faults`, which goes on where it was interrupted;
every run is a line of [faults.jsonl](faults.jsonl).

- Input: {n:,} images of 64 x 64 pixels, {bad} bad files among them; a ResNet50 checkpoint at 32 pixels; parts of 100
  rows.
- `stock`: `read_parquet` of the paths, `download`, Pillow in `map` with try/except, an actor pool of one model,
  `write_parquet`; `+ checkpoint`: the same with Ray's `CheckpointConfig`; `read_images`: instead of `download`.
  A command that was killed or that failed is run again until it ends with 0, as its user would do, at most
  {commands} times; a run is cut after {cut:.0f} minutes and counted as it stands.
- Right: rows = {n:,}, as many distinct paths, none missing and none unlisted, every row (path, status, label,
  probability to four digits) equal to that of the first run without faults by sha256, no file that cannot be read or
  should not be there, and `_SUCCESS` exactly then. Of `stock`, whose batches differ from run to run, only that every
  row is there once, with the label it has without faults and a probability within 0.001; it has no statuses and no
  `_SUCCESS`.
- Lost, doubled, wrong: rows over all runs; in brackets the most of one run.
- Again: image reads beyond one a file, the median of the runs, in percent of the {n:,}.
- Slower: the median wall time beside the same pipeline without faults in the same place, all commands of a run
  together. Two runs are made at a time, those without faults too; five of `stock` where an image kills its decoder.

Machine: {machine}; {first} to {last} UTC;
revision{revisions}.
"""

HEAD = ("fault", "pipeline", "runs", "right", "injected", "lost", "doubled", "wrong", "again", "slower", "cut")


def write_page(path: Path, scenarios: Sequence[Scenario], results: Results, baselines: Mapping[str, str]) -> None:
    """Write the page, or nothing before the first run."""
    if not results.runs:
        return
    rows = [row for scenario in scenarios for row in _rows(scenario, results, baselines)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * len(HEAD), *rows])
    sections = [
        _introduction(results),
        table,
        *_missing(scenarios, results),
        *_wrong(results),
        *_elsewhere(results.work),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(section.strip() for section in sections) + "\n")


def _introduction(results: Results) -> str:
    names = list((results.reference(OURS) or ({}, 0))[0])
    revisions = sorted({run.revision for run in results.runs})
    return INTRODUCTION.format(
        n=N,
        bad=sum(map(is_bad, names)),
        cut=CUT_S / 60,
        commands=MAX_COMMANDS,
        machine=machine(("ray", "torch", "pyarrow", "pillow")),
        first=min(run.when for run in results.runs)[:16],
        last=max(run.when for run in results.runs)[:16],
        revisions=("s " if len(revisions) > 1 else " ") + ", ".join(revisions),
    )


def _rows(scenario: Scenario, results: Results, baselines: Mapping[str, str]) -> Iterator[list[str]]:
    for pipeline in scenario.pipelines:
        runs = results.of(scenario.name, pipeline)
        if not runs:
            continue
        usual_s = results.wall_s(baselines[scenario.place], pipeline)
        again = 100 * (median(run.images_read for run in runs) / N - 1)
        yield [
            scenario.name,
            pipeline,
            str(len(runs))
            if len(runs) == scenario.num_runs(pipeline)
            else f"{len(runs)} of {scenario.num_runs(pipeline)}",
            str(sum(run.right for run in runs)),
            f"{sum(run.injected for run in runs):,}",
            *(_counts([getattr(run, name) for run in runs]) for name in ("lost", "doubled", "wrong")),
            f"{max(0.0, again):.0f}%",  # the stock pipeline never asks for an empty file
            f"{median(run.wall_s for run in runs) / usual_s:.2f}x" if usual_s else "",
            str(sum(run.cut for run in runs)),
        ]


def _missing(scenarios: Sequence[Scenario], results: Results) -> list[str]:
    rows = [f"{s.name}, {pipeline}" for s in scenarios for pipeline in s.pipelines if not results.of(s.name, pipeline)]
    return ["Not run: " + "; ".join(rows) + "."] if rows else []


def _counts(counts: list[int]) -> str:
    return f"{sum(counts):,} ({max(counts):,})" if len(counts) > 1 and any(counts) else f"{sum(counts):,}"


def _wrong(results: Results) -> list[str]:
    """Say what was not right beside the numbers, and how long it took where that is limited."""
    lines = []
    for (fault, pipeline), runs in _grouped(results.runs).items():
        problems = Counter(problem for run in runs for problem in set(map(_class_of, run.problems)))
        if problems:
            shown = "; ".join(f"{problem} ({count} of {len(runs)} runs)" for problem, count in problems.most_common(3))
            lines.append(f"- {fault}, {pipeline}: {shown}")
    timed = []
    for (fault, pipeline), runs in _grouped(results.runs).items():
        notes = [note for run in runs for note in run.notes if note.startswith("ended ")]
        if notes:
            seconds = sorted(float(note.split()[1]) for note in notes)
            what = notes[0].split(" ", 3)[3]
            timed.append(f"- {fault}, {pipeline}: ended {median(seconds):.1f} s {what}, at most {seconds[-1]:.1f} s")
    sections = []
    if lines:
        sections.append("## What was not right, beside the counts\n\n" + "\n".join(lines))
    if timed:
        sections.append("## How soon a command ended that had to\n\n" + "\n".join(timed))
    return sections


def _grouped(runs: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        groups.setdefault((run.fault, run.pipeline), []).append(run)
    return groups


def _class_of(problem: str) -> str:
    """Name a kind of problem: without the file it happened to."""
    for end in ("cannot be read", "should not be there", "is in sight, partly written"):
        if problem.endswith(end):
            return f"a file that {end}"
    return "a row of another content" if ": Row(" in problem else problem


def _elsewhere(work: Path) -> Iterator[str]:
    planning, cost = read_planning(work), read_cost(work)
    if planning:
        yield (
            "## A resume of 100 million files\n\n"
            f"A generated manifest of {NUM_SHARDS * SHARD_SIZE:,} rows in {NUM_SHARDS:,} shards on the local disk, of "
            f"which {planning['open_shards']:,} were open: {planning['plan_s']:.2f} s and "
            f"{planning['plan_rss_bytes'] / 2**20:,.0f} MiB at most from the command's settings to the first file that "
            "is labelled (asked: 60 s, 2 GiB). "
            f"The proof reads {planning['proof_rows_per_s']:,.0f} rows/s of the local disk in one process, "
            f"{NUM_SHARDS * SHARD_SIZE / planning['proof_rows_per_s']:,.0f} s for all of them, "
            "with the memory of a few shards."
        )
    if cost:
        yield _cost(cost)


def _cost(cost: list[dict]) -> str:
    pairs = [
        {run["pipeline"]: run for run in cost if run["pair"] == pair} for pair in sorted({run["pair"] for run in cost})
    ]
    lines = []
    for name, what in (("cpu_s_an_image", "CPU seconds an image"), ("wall_s", "wall seconds")):
        ratios = sorted(pair[SAFE][name] / pair[BARE][name] for pair in pairs)
        safe, bare = (median(pair[pipeline][name] for pair in pairs) for pipeline in (SAFE, BARE))
        lines.append(
            f"- {what}: {safe:.4g} beside {bare:.4g}; the pairs' ratios {ratios[0]:.3f} to {ratios[-1]:.3f}, median "
            f"**{median(ratios):.3f}**"
        )
    return (
        "## What it costs without faults\n\n"
        f"{NUM_IMAGES:,} drawn pictures of 404 x 360 pixels at `--img-size 224`, {len(pairs)} interleaved pairs of "
        "`catsdogs score` and the same stages without plan, lease, child process, records and proof "
        "(`benchmarks/faults/bare.py`); the CPU seconds are those of the driver, of Ray's processes and of the "
        "workers, with start-up (asked: at most 1.03).\n\n" + "\n".join(lines)
    )
