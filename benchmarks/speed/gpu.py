"""Measure catsdogs and its peers on a GPU in at most 8 minutes, and write docs/benchmarks-gpu.md.

python -m benchmarks.speed.gpu --images data/cats_and_dogs_filtered --checkpoint runs/first/best

It prints a JSON line for each figure as soon as it is known, the most important first. Each section is a process of its
own with a time limit: one that fails or hangs ends alone. `--sections` runs some of them, in the given order:

    score     `catsdogs score`, decoding on the GPU, steady
    loader    the tuned DataLoader of 16 processes
    train     `catsdogs train`, all layers, in the default batch size, from the second epoch
    train32   the same in batches of 32, and an eager fp32 step
    labels    `catsdogs score`, decoding on CPUs: are the labels those of `score`?
    checks    on the GPU: the CUDA graph, the augmentation and the resizing compute what the plain forms compute
    steps     training steps and parts of scoring, in memory
    scratch   ResNet50 from scratch on the photographs, 200 epochs, as far as the time allows; alone, up to 8 minutes

Args (of the command):
    --images: a folder with `train/CLASS/*.jpg` and `validation/CLASS/*.jpg`.
    --checkpoint: trained, for the agreement of labels; the default has random weights.
    --smoke: the smallest sizes, to test the command itself, also on a CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.checkpoints import save_random
from benchmarks.speed import gpu_names as names
from benchmarks.speed.contestants import CLASS_NAMES
from benchmarks.speed.page import describe_origin, format_table, read_revision
from benchmarks.speed.timing import kill_tree

MAX_S = 470.0  # in all
MIN_SECTION_S = 15.0  # a section with less time left is skipped
LIMITS_S = {  # the most important first
    "score": 80.0,
    "loader": 45.0,
    "train": 150.0,
    "train32": 90.0,
    "labels": 60.0,
    "checks": 60.0,
    "steps": 60.0,
    "scratch": MAX_S,
}
RATIOS = (  # of two figures, in the words of the page
    (names.SCORE_RATE, names.LOADER_RATE, 2.5),
    (names.TRAIN32_RATE, names.EAGER32_RATE, 2.0),
)
PACKAGES = ("torch", "torchvision", "ray", "pillow")
INTRODUCTION = """# Benchmarks on a GPU

Made by `{command}`, every command once, in at most 8 minutes. {weights}

Machine: {machine}; {when} UTC; revision {revision}.
"""
RANDOM_WEIGHTS = "The weights are random, which does not change the speed."
Figures = dict[str, float]


def main() -> None:
    """Run the sections, and write the page from their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--checkpoint", type=Path, help="for the agreement of labels; default: random weights")
    parser.add_argument("--sections", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-gpu.md"))
    options = parser.parse_args()
    origin = _describe()
    print(json.dumps({"machine": origin["machine"], "revision": origin["revision"]}), flush=True)
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="catsdogs-") as folder:
        work = Path(folder)
        if options.checkpoint is None:
            save_random(work / "model", CLASS_NAMES)
        else:
            (work / "model").symlink_to(options.checkpoint.absolute())
        arguments = ["--images", str(options.images), "--work", folder, *(["--smoke"] if options.smoke else [])]
        for section, figures in _run_sections(options.sections, arguments):
            found[section] = figures
            _print_ratios(found)
            weights = RANDOM_WEIGHTS if options.checkpoint is None else f"Checkpoint: {options.checkpoint.name}."
            options.page.write_text(_format_page(found, INTRODUCTION.format(weights=weights, **origin)))


def _describe() -> dict[str, str]:
    try:
        revision = read_revision()
    except (OSError, subprocess.CalledProcessError):  # a copy of the files without their history
        revision = "unknown"
    return describe_origin("benchmarks.speed.gpu", PACKAGES, revision)


def _run_sections(sections: Sequence[str], arguments: Sequence[str]) -> Iterator[tuple[str, Figures]]:
    end = time.monotonic() + MAX_S
    for section in sections:
        limit_s = min(LIMITS_S[section], end - time.monotonic())
        if limit_s < MIN_SECTION_S:
            _print({"skipped": section})
            continue
        command = [sys.executable, "-m", "benchmarks.speed.gpu_sections", section, *arguments]
        yield section, run_section(section, command, limit_s)


def run_section(section: str, command: Sequence[str], limit_s: float) -> Figures:
    """Run the process of a section for at most `limit_s`, pass on its lines and return its figures."""
    started, figures = time.monotonic(), Figures()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        timer = threading.Timer(limit_s, kill_tree, [process.pid])
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            figure = _parse(line)
            figures[str(figure.get("figure"))] = figure.get("value", 0.0)
        process.wait()
        ended_by_limit = not timer.is_alive()
        timer.cancel()
    figures.pop("None", None)
    seconds = round(time.monotonic() - started, 1)
    _print({"section": section, "s": seconds, "rc": process.returncode, "cut": ended_by_limit})
    return figures


def _parse(line: str) -> dict[str, float]:
    try:
        found = json.loads(line)
    except ValueError:  # a line of another program
        return {}
    return found if isinstance(found, dict) else {}


def _print_ratios(found: Mapping[str, Figures]) -> None:
    figures = {name: value for section in found.values() for name, value in section.items()}
    last = list(found.values())[-1]
    for over, under, minimum in RATIOS:
        if (over in last or under in last) and figures.get(over) and figures.get(under):
            value = figures[over] / figures[under]
            _print({"figure": f"{over} / {under}", "value": round(value, 3), "goal": minimum})


def _print(record: Mapping[str, object]) -> None:
    print(json.dumps(record), flush=True)


def _format_page(found: Mapping[str, Figures], introduction: str) -> str:
    rows = [(section, name, f"{value:,.4g}") for section, figures in found.items() for name, value in figures.items()]
    return "\n".join([introduction, format_table(("section", "figure", "value"), rows)])


if __name__ == "__main__":
    main()
