"""Results -> docs/faults.md."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.faults.cost import MAX_CPU_RATIO, NUM_IMAGES, Run, compare, read_cost
from benchmarks.faults.inputs import N, is_bad
from benchmarks.faults.planning import NUM_SHARDS, SHARD_SIZE, read_planning
from benchmarks.faults.results import Result, Results
from benchmarks.faults.scenarios import Scenario
from benchmarks.faults.trial import CUT_S, MAX_COMMANDS, OURS
from benchmarks.machine import describe_machine

INTRODUCTION = """# Faults

Rows that `catsdogs score` loses, duplicates or gets wrong when machines, networks and disks fail, compared with the
pipeline of Ray's documentation under the same faults. Made by `make faults`, which resumes where it was interrupted;
every run is a line of [faults.jsonl](faults.jsonl).

- Input: {n:,} images of 64 x 64 pixels, {bad} bad files among them; a ResNet50 checkpoint at 32 pixels; parts of 100
  rows.
- `stock`: `read_parquet` of the paths, `download`, Pillow in `map` with try/except, an actor pool of one model,
  `write_parquet`; `+ checkpoint`: the same with Ray's `CheckpointConfig`; `read_images`: instead of `download`.
  A command that was killed or failed is run again until it ends with 0, at most {commands} times. A run is cut after
  {cut:.0f} minutes and judged by what it wrote.
- Right: {n:,} rows with {n:,} distinct listed paths; every row (path, status, label, probability to four digits) equal
  by sha256 to that of the first run without faults; no unreadable and no unexpected file; `_SUCCESS` if and only if all
  of this is true. `stock` has no statuses and no `_SUCCESS`, and its batches differ from run to run: it is right if
  every row is there once, with the label of the run without faults and a probability within 0.001.
- Lost, doubled, wrong: rows, summed over all runs; in brackets the maximum of one run.
- Again: image reads beyond one per file, the median of the runs, in percent of the {n:,}.
- Slower: the median wall time of all commands of a run, relative to the same pipeline without faults in the same
  place. Two runs at a time, also without faults; five of `stock` where an image kills its decoder.

Machine: {machine}; {first} to {last} UTC;
revision{revisions}.
"""

COST_VALUES: Mapping[Literal["cpu_s_per_image", "wall_s"], str] = {
    "cpu_s_per_image": "CPU seconds per image",
    "wall_s": "wall seconds",
}
HEAD = ("fault", "pipeline", "runs", "right", "injected", "lost", "doubled", "wrong", "again", "slower", "cut")


def write_page(path: Path, scenarios: Sequence[Scenario], results: Results, baselines: Mapping[str, str]) -> None:
    """Write the page; without results, do nothing."""
    if not results.runs:
        return
    rows = [row for scenario in scenarios for row in _format_rows(scenario, results, baselines)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * len(HEAD), *rows])
    sections = [
        _format_introduction(results),
        table,
        *_list_missing(scenarios, results),
        *_list_problems(results),
        *_list_durations(results),
        *_format_measurements(results.work),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(section.strip() for section in sections) + "\n")


def _format_introduction(results: Results) -> str:
    names = list((results.reference(OURS) or ({}, 0))[0])
    revisions = sorted({run.revision for run in results.runs})
    return INTRODUCTION.format(
        n=N,
        bad=sum(map(is_bad, names)),
        cut=CUT_S / 60,
        commands=MAX_COMMANDS,
        machine=describe_machine(("ray", "torch", "pyarrow", "pillow")),
        first=min(run.when for run in results.runs)[:16],
        last=max(run.when for run in results.runs)[:16],
        revisions=("s " if len(revisions) > 1 else " ") + ", ".join(revisions),
    )


def _format_rows(scenario: Scenario, results: Results, baselines: Mapping[str, str]) -> Iterator[list[str]]:
    for pipeline in scenario.pipelines:
        runs = results.find(scenario.name, pipeline)
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
            *(_format_counts([getattr(run, name) for run in runs]) for name in ("lost", "doubled", "wrong")),
            f"{max(0.0, again):.0f}%",  # the stock pipeline does not read empty files
            f"{median(run.wall_s for run in runs) / usual_s:.2f}x" if usual_s else "",
            str(sum(run.cut for run in runs)),
        ]


def _list_missing(scenarios: Sequence[Scenario], results: Results) -> list[str]:
    rows = [
        f"{s.name}, {pipeline}" for s in scenarios for pipeline in s.pipelines if not results.find(s.name, pipeline)
    ]
    return ["Not run: " + "; ".join(rows) + "."] if rows else []


def _format_counts(counts: list[int]) -> str:
    return f"{sum(counts):,} ({max(counts):,})" if len(counts) > 1 and any(counts) else f"{sum(counts):,}"


def _list_problems(results: Results) -> list[str]:
    """Write the section of problems that the table does not count."""
    lines = []
    for (fault, pipeline), runs in _group_by_row(results.runs).items():
        problems = Counter(problem for run in runs for problem in set(map(_generalize, run.problems)))
        if problems:
            shown = "; ".join(f"{problem} ({count} of {len(runs)} runs)" for problem, count in problems.most_common(3))
            lines.append(f"- {fault}, {pipeline}: {shown}")
    return ["## Problems beside the counts\n\n" + "\n".join(lines)] if lines else []


def _list_durations(results: Results) -> list[str]:
    """Write the section of the times in which commands ended, where these are limited."""
    lines = []
    for (fault, pipeline), runs in _group_by_row(results.runs).items():
        notes = [note for run in runs for note in run.notes if note.startswith("ended ")]
        if notes:
            seconds = sorted(float(note.split()[1]) for note in notes)
            what = notes[0].split(" ", 3)[3]
            lines.append(f"- {fault}, {pipeline}: ended {median(seconds):.1f} s {what}, at most {seconds[-1]:.1f} s")
    return ["## Time to the end of a command that had to end\n\n" + "\n".join(lines)] if lines else []


def _group_by_row(runs: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        groups.setdefault((run.fault, run.pipeline), []).append(run)
    return groups


def _generalize(problem: str) -> str:
    """Describe a problem without its file."""
    for end in ("cannot be read", "should not be there", "is visible, but partly written"):
        if problem.endswith(end):
            return f"a file that {end}"
    return "a row with other values" if ": Row(" in problem else problem


def _format_measurements(work: Path) -> Iterator[str]:
    planning, cost = read_planning(work), read_cost(work)
    if planning:
        yield (
            "## A resume of 100 million files\n\n"
            f"A generated manifest of {NUM_SHARDS * SHARD_SIZE:,} rows in {NUM_SHARDS:,} shards on the local disk, of "
            f"which {planning['open_shards']:,} were open. A resume takes {planning['plan_s']:.2f} s and at most "
            f"{planning['plan_rss_bytes'] / 2**20:,.0f} MiB until it scores its first file (goal: 60 s, 2 GiB). "
            f"The audit reads {planning['audit_rows_per_s']:,.0f} rows/s of the local disk in one process, "
            f"{NUM_SHARDS * SHARD_SIZE / planning['audit_rows_per_s']:,.0f} s for all of them, "
            "in the memory of a few shards."
        )
    if cost:
        yield _format_cost(cost)


def _format_cost(runs: Sequence[Run]) -> str:
    lines = []
    for name, what in COST_VALUES.items():
        found = compare(runs, name)
        lines.append(
            f"- {what}: {found.safe:.4g} beside {found.bare:.4g}; the ratios of the pairs {found.ratios[0]:.3f} to "
            f"{found.ratios[-1]:.3f}, median **{median(found.ratios):.3f}**"
        )
    return (
        "## The cost without faults\n\n"
        f"{NUM_IMAGES:,} drawn pictures of 404 x 360 pixels at `--img-size 224`, {len(found.ratios)} pairs in turn of "
        "`catsdogs score` and the same stages without plan, lease, child process, parts, records and audit "
        "(`benchmarks/faults/bare.py`). CPU seconds are of the driver, of Ray's processes and of the workers, start-up "
        f"included (goal: at most {MAX_CPU_RATIO}).\n\n" + "\n".join(lines)
    )
