"""The command line, derived from the settings in `config`.

Exit codes: 0 done; 1 the run failed; 2 the input is wrong; 3 too many rows failed; 130 Ctrl-C; 141 broken pipe
(`| head`); 143 SIGTERM.
"""

import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from catsdogs import __version__
from catsdogs.config import DemoConfig, DownloadConfig, EvaluateConfig, ScoreConfig, TrainConfig, VerifyConfig
from catsdogs.display import BrokenPipeExit, Display, open_streams, print_error, print_result
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.logs import LOG_VARIABLE, configure_logging, escape_lines
from catsdogs.text import format_line

SIGTERM_REPEAT_S = 10.0  # a command that still runs after this time missed the first SIGTERM

Command = (
    Annotated[DemoConfig, tyro.conf.subcommand("demo")]
    | Annotated[DownloadConfig, tyro.conf.subcommand("download")]
    | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
)
# Settings with paths, which must be absolute in a Ray job.
PATH_SETTINGS = ("data_dir", "labels", "exclude", "storage_path", "checkpoint", "input", "output")
RESUME_HINTS: dict[type, str] = {
    TrainConfig: "saved epochs are kept; to resume, repeat the command with --resume and the --name of the run",
    ScoreConfig: "finished parts are kept; run the same command to resume",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fine-tune ResNet50; bulk-classify images."""

    command: Command
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Log to stderr with tracebacks; before or after the command."""


class _Terminated(SystemExit):
    """SIGTERM was received. Not an `Exception`, so that no retry catches it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print_result(f"catsdogs {__version__}")
        return 0
    if "--verbose" in arguments[1:]:
        arguments = ["--verbose", *(argument for argument in arguments if argument != "--verbose")]
    display = Display()
    joined = _find_initialized_ray() is not None
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGALRM, _terminate)
    if "--verbose" in arguments:
        os.environ[LOG_VARIABLE] = "debug"  # Ray's workers inherit it
    handler = configure_logging()
    try:
        return _run(arguments, display)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        display.close()
        if not joined and (start := sys.modules.get("catsdogs.start")):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            on_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)
            start.stop_ray()  # ends everything that an interrupted command left running
            signal.signal(signal.SIGINT, on_sigint)
        logging.getLogger("catsdogs").removeHandler(handler)


def _run(arguments: list[str], display: Display) -> int:
    """Parse the arguments, run the command, and convert its exceptions to exit codes."""
    config: Any = None
    try:
        config = tyro.cli(
            Arguments,
            args=arguments,
            prog="catsdogs",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        ).command
        _check_paths(config)
        return COMMANDS[type(config)](config, display)
    except InputError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except (KeyboardInterrupt, _Terminated):
        if _is_terminated():
            return _fail(f"terminated: {_describe_kept(config)}", 143)
        return _fail(f"interrupted: {_describe_kept(config)}", 130)
    except (BrokenPipeExit, BrokenPipeError):
        # Python flushes stdout when it exits and would report the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:  # noqa: BLE001 - a bug: show its traceback, and what is kept
        print_error(escape_lines(traceback.format_exc().rstrip("\n")))
        return _fail(f"unexpected error, see the traceback above; {_describe_kept(config)}", 1)


def _describe_kept(config: object) -> str:
    """Say what is kept of an interrupted command, and how to resume it."""
    return RESUME_HINTS.get(type(config), "what is done is kept")


def _fail(reason: object, code: int) -> int:
    if isinstance(reason, CatsdogsError):
        logger.debug("the command failed", exc_info=reason)
    print_error(format_line(f"catsdogs: {reason}"))
    return code


def _terminate(_signal: int, _frame: types.FrameType | None) -> NoReturn:
    """Stop the command, and once more later, because an exception in a callback or finalizer is lost."""
    signal.setitimer(signal.ITIMER_REAL, SIGTERM_REPEAT_S)
    raise _Terminated


def _is_terminated() -> bool:
    """Whether SIGTERM was received. Ray's core raises KeyboardInterrupt instead of a signal handler's exception."""
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _find_initialized_ray() -> types.ModuleType | None:
    """Return Ray if it is imported and initialized; importing it takes a second."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None


def _check_paths(config: Any) -> None:
    """Raise InputError for a relative path in a Ray job, whose working folder is removed with the job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # Ray sets this environment variable in a job
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in PATH_SETTINGS and value and "://" not in value and not os.path.isabs(value):
            raise InputError(
                f"--{field.name.replace('_', '-')} {value}: expected an absolute path that every node sees, "
                "or s3://..., since a job's working folder is a copy that is removed with the job"
            )


def _demo(config: DemoConfig, display: Display) -> int:
    from catsdogs.demo import demo

    print_result(demo(config, display))
    return 0


def _download(config: DownloadConfig, display: Display) -> int:
    from catsdogs.download import download

    root = download(config.url, Path(config.output), display)
    print_result(f"{root}: ready for catsdogs train --data-dir {shlex.quote(str(root))}")
    return 0


def _train(config: TrainConfig, display: Display) -> int:
    from catsdogs.train import train

    result = train(config, display)
    print_result(
        f"best validation accuracy {result.val_accuracy:.4f} in epoch {result.best_epoch}\n"
        f"checkpoint {result.uri}/best, report {result.uri}/report.html"
    )
    return 0


def _evaluate(config: EvaluateConfig, display: Display) -> int:
    from catsdogs.evaluate import evaluate

    metrics = evaluate(config, display)
    low, high = metrics["accuracy_interval_95"]
    print_result(json.dumps({"accuracy": metrics["accuracy"], "n": metrics["n"], "failed": metrics["failed"]}))
    print_result(
        f"accuracy {metrics['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f}); "
        f"all numbers in {config.output}/metrics.json"
    )
    if metrics["failed"] == metrics["n"]:
        return _fail_rows(metrics["failed"], metrics["n"])
    return 0


def _score(config: ScoreConfig, display: Display) -> int:
    from catsdogs.score import score

    summary = score(config, display)
    failed = summary["rows"] - summary["by_status"].get("ok", 0)
    print_result(
        f"{summary['rows']:,} rows in {config.output}, {failed:,} not classified (columns status and error); "
        f"last run: {summary['scored']:,} rows at {summary['images_per_s']:.1f} img/s, "
        f"slowest stage {summary['limited_by']}"
    )
    if failed == summary["rows"] or failed > config.max_error_rate * summary["rows"]:
        return _fail_rows(failed, summary["rows"])
    return 0


def _fail_rows(failed: int, total: int) -> int:
    return _fail(f"{failed:,} of {total:,} images were not classified: see the columns status and error", 3)


def _verify(config: VerifyConfig, display: Display) -> int:
    from catsdogs.score import verify

    totals = verify(config, display)
    print_result(
        f"{totals['rows']:,} rows for {totals['listed']:,} listed files in {config.output}: none missing, none twice"
    )
    return 0


COMMANDS: dict[type, Callable[[Any, Display], int]] = {
    DemoConfig: _demo,
    DownloadConfig: _download,
    TrainConfig: _train,
    EvaluateConfig: _evaluate,
    ScoreConfig: _score,
    VerifyConfig: _verify,
}
