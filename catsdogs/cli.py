"""Dataclass -> command line; the only module that prints. Errors are one line each.

Exit codes: 0 done; 1 the run failed; 2 the input is wrong; 3 too many rows failed; 130 Ctrl-C; 141 nobody reads its
lines any more; 143 SIGTERM.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import tyro

from catsdogs import __version__
from catsdogs.config import DemoConfig, DownloadConfig, EvaluateConfig, ScoreConfig, TrainConfig, VerifyConfig
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Message, StageProgress

BEGAN = time.monotonic()
LINE_EVERY_S = 5.0  # between progress lines where there is no terminal
TERMINATED_S = 10.0  # in which a command has cleaned up, or did not hear of SIGTERM

Command = (
    Annotated[DemoConfig, tyro.conf.subcommand("demo")]
    | Annotated[DownloadConfig, tyro.conf.subcommand("download")]
    | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
)
# Paths that a job's throw-away working folder would swallow.
PATH_SETTINGS = ("data_dir", "storage_path", "checkpoint", "input", "output")


class _Terminated(SystemExit):
    """SIGTERM came."""


class _BrokenPipe(SystemExit):
    """Who read our lines has gone, as with `| head`."""


class Display:
    """Shows progress: bars on a terminal, otherwise a line every few seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: dict[str, Any] = {}
        self._forward_events: dict[str, float] = {}
        self._labelled = False

    def __call__(self, event: StageProgress | Message) -> None:
        """Show one event."""
        if isinstance(event, StageProgress) and event.stage == "score" and not self._labelled:
            self._labelled = True
            self._line(f"first batch labelled {time.monotonic() - BEGAN:.1f} s after the start")
        if isinstance(event, Message):
            self._line(event.text)
        elif self._terminal:
            self._bar(event)
        else:
            self._step_line(event)

    def close(self) -> None:
        """Leave the terminal as it was."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def _line(self, text: str) -> None:
        for bar in self._bars.values():
            bar.clear()
        try:
            print(printable(text), flush=True)
        except BrokenPipeError as error:
            raise _BrokenPipe from error  # which nothing on the way takes for a failure of its own

    def _bar(self, step: StageProgress) -> None:
        from tqdm import tqdm

        bar = self._bars.get(step.stage)
        if bar is None or step.done < bar.n:
            if bar is not None:
                bar.close()
            bar = self._bars[step.stage] = tqdm(
                total=step.total, desc=step.stage, unit=" images", leave=False, dynamic_ncols=True
            )
        bar.total = step.total
        bar.set_postfix_str(step.note, refresh=False)
        bar.update(step.done - bar.n)

    def _step_line(self, step: StageProgress) -> None:
        now = time.monotonic()
        if now - self._forward_events.get(step.stage, -LINE_EVERY_S) >= LINE_EVERY_S:
            self._forward_events[step.stage] = now
            total = "" if step.total is None else f"/{step.total:,}"
            self._line(f"{step.stage} {step.done:,}{total}" + (f"  {step.note}" if step.note else ""))


def printable(text: str) -> str:
    """Spell control characters, which could drive a terminal, and what UTF-8 cannot hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"catsdogs {__version__}")
        return 0
    display = Display()
    joined = _ray_runs()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGALRM, _terminate)
    try:
        config: Any = tyro.cli(
            Command, args=arguments, prog="catsdogs", description="Fine-tune ResNet50; bulk-classify images."
        )
        _check_paths(config)
        code = COMMANDS[type(config)](config, display)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted: what is done is kept", 130)
    except _Terminated:
        return _fail("terminated: what is done is kept", 143)
    except (_BrokenPipe, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 141
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        display.close()
        if not joined:
            _leave_ray()


def _fail(reason: object, code: int) -> int:
    print(f"catsdogs: {printable(str(reason))}", file=sys.stderr, flush=True)
    return code


def _terminate(_signal: int, _frame: types.FrameType | None) -> NoReturn:
    """Break the command off; again later, since an exception in somebody's callback or finalizer gets lost."""
    signal.setitimer(signal.ITIMER_REAL, TERMINATED_S)
    raise _Terminated


def _ray_runs() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _leave_ray() -> None:
    """End the Ray of this command, and with it all that a broken-off command left running."""
    if _ray_runs():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.modules["ray"].shutdown()


def _check_paths(config: Any) -> None:
    """Refuse relative paths where the working folder is a job's copy, gone when the job ends.

    Raises:
        InputError: names the flag.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in PATH_SETTINGS and "://" not in value and not os.path.isabs(value):
            raise InputError(
                f"--{field.name.replace('_', '-')} {value}: expected an absolute path that every node sees, "
                "or s3://..., since a job's working folder is a copy that goes with the job"
            )


def _demo(config: DemoConfig, display: Display) -> int:
    from catsdogs.demo import demo

    print(demo(config, display))
    return 0


def _download(config: DownloadConfig, display: Display) -> int:
    from pathlib import Path

    from catsdogs.download import download

    root = download(
        config.url, Path(config.output), lambda stage, done, total: display(StageProgress(stage, done, total))
    )
    print(f"{root}: ready for catsdogs train --data-dir {root}")
    return 0


def _train(config: TrainConfig, display: Display) -> int:
    from catsdogs.start import import_while_ray_starts

    train = import_while_ray_starts("catsdogs.train").train

    result = train(config, display)
    print(
        f"best validation accuracy {result.val_accuracy:.4f} in epoch {result.best_epoch}\n"
        f"checkpoint {result.uri}/best, report {result.uri}/report.html"
    )
    return 0


def _evaluate(config: EvaluateConfig, display: Display) -> int:
    from catsdogs.start import import_while_ray_starts

    evaluate = import_while_ray_starts("catsdogs.evaluate").evaluate

    metrics = evaluate(config, display)
    low, high = metrics["accuracy_interval_95"]
    print(json.dumps({"accuracy": metrics["accuracy"], "n": metrics["n"], "failed": metrics["failed"]}))
    print(f"accuracy {metrics['accuracy']:.4f} ({low:.4f} to {high:.4f}); all numbers in {config.output}/metrics.json")
    return 0


def _score(config: ScoreConfig, display: Display) -> int:
    from catsdogs.start import import_while_ray_starts

    score = import_while_ray_starts("catsdogs.score").score

    summary = score(config, display)
    failed = summary["rows"] - summary["by_status"].get("ok", 0)
    print(
        f"{summary['rows']:,} rows in {config.output}, {failed:,} without a label; "
        f"{summary['scored']:,} scored last at {summary['images_per_s']:.1f} img/s, limited by {summary['limited_by']}"
    )
    if failed == summary["rows"] or failed > config.max_error_rate * summary["rows"]:
        return _fail(f"{failed:,} of {summary['rows']:,} images have no label: see the columns status and error", 3)
    return 0


def _verify(config: VerifyConfig, display: Display) -> int:
    from catsdogs.score import verify

    totals = verify(config, display)
    print(f"{totals['rows']:,} rows for {totals['listed']:,} listed files in {config.output}: none missing, none twice")
    return 0


COMMANDS: dict[type, Callable[[Any, Display], int]] = {
    DemoConfig: _demo,
    DownloadConfig: _download,
    TrainConfig: _train,
    EvaluateConfig: _evaluate,
    ScoreConfig: _score,
    VerifyConfig: _verify,
}
