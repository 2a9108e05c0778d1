"""The command line, derived from the settings in `config`.

Exit codes: 0 done; 1 the run failed; 2 the input is wrong; 3 too many rows failed, or --fail-if holds;
130 Ctrl-C; 141 broken pipe (`| head`); 143 SIGTERM.
"""

import dataclasses
import logging
import os
import signal
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import tyro

from catsdogs import __version__
from catsdogs.commands import COMMANDS, fail
from catsdogs.config import (
    AuditConfig,
    CompareConfig,
    DemoConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    ReviewConfig,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
)
from catsdogs.display import BrokenPipeExit, Display, open_streams, print_error, print_result
from catsdogs.errors import InputError, RunError
from catsdogs.logs import LOG_VARIABLE, configure_logging, escape_lines

SIGTERM_REPEAT_S = 10.0  # a command that still runs after this time missed the first SIGTERM

# A and B are positional, and `class` is no name in Python. The settings do not import tyro, which takes longer than all
# else that they import.
CompareConfig.__annotations__ |= {
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar=name.upper())] for name in ("a", "b")
}
ReviewConfig.__annotations__["class_name"] = Annotated[str | None, tyro.conf.arg(name="class")]

Command = (
    Annotated[DemoConfig, tyro.conf.subcommand("demo")]
    | Annotated[DownloadConfig, tyro.conf.subcommand("download")]
    | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[AuditConfig, tyro.conf.subcommand("audit")]
    | Annotated[ReviewConfig, tyro.conf.subcommand("review")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
)
# Settings with paths, which must be absolute in a Ray job.
PATH_SETTINGS = (
    "data_dir",
    "labels",
    "exclude",
    "against",
    "suspects",
    "storage_path",
    "checkpoint",
    "input",
    "scores",
    "output",
)
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
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except (KeyboardInterrupt, _Terminated):
        if _is_terminated():
            return fail(f"terminated: {_describe_kept(config)}", 143)
        return fail(f"interrupted: {_describe_kept(config)}", 130)
    except (BrokenPipeExit, BrokenPipeError):
        # Python flushes stdout when it exits and would report the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:  # noqa: BLE001 - a bug: show its traceback, and what is kept
        print_error(escape_lines(traceback.format_exc().rstrip("\n")))
        return fail(f"unexpected error, see the traceback above; {_describe_kept(config)}", 1)


def _describe_kept(config: object) -> str:
    """Say what is kept of an interrupted command, and how to resume it."""
    return RESUME_HINTS.get(type(config), "what is done is kept")


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
    """Raise InputError for an empty path, and for a relative one in a Ray job, whose folder is removed with the job."""
    for name in PATH_SETTINGS:
        if getattr(config, name, None) == "":  # of a variable that is not set
            raise InputError(f"--{name.replace('_', '-')}: expected a path or URI, got an empty one")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # Ray sets this environment variable in a job
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in PATH_SETTINGS and value and "://" not in value and not os.path.isabs(value):
            raise InputError(
                f"--{field.name.replace('_', '-')} {value}: expected an absolute path that every node sees, "
                "or s3://..., since a job's working folder is a copy that is removed with the job"
            )
