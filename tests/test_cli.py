"""The command line, in a subprocess where imports, streams or exit codes matter."""

import functools
import io
import json
import logging
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from catsdogs import __version__, cli, logs, start
from catsdogs.config import (
    AuditConfig,
    CompareConfig,
    DemoConfig,
    DownloadConfig,
    EvaluateConfig,
    ReviewConfig,
    ScoreConfig,
    TrainConfig,
)
from catsdogs.display import Display
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Message, StageProgress
from catsdogs.text import escape_invisible

BIN = Path(sys.executable).parent
REQUIRED = {
    "demo": ["--output", "o"],
    "download": ["--output", "o"],
    "train": ["--data-dir", "d"],
    "evaluate": ["--data-dir", "d", "--checkpoint", "c", "--output", "o"],
    "score": ["--input", "i", "--checkpoint", "c", "--output", "o"],
    "audit": ["--data-dir", "d", "--output", "o"],
}
CONFIGS = {
    "demo": DemoConfig,
    "download": DownloadConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "audit": AuditConfig,
}


@pytest.fixture(autouse=True)
def _keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def runs(monkeypatch):
    """Replace the work of a command: runs(command, work) -> the list of settings it is called with."""

    def replace(command: str, work=lambda config, display: 0) -> list:
        configs = []
        monkeypatch.setitem(cli.COMMANDS, CONFIGS[command], lambda c, d: configs.append(c) or work(c, d))
        return configs

    return replace


def failing(error: BaseException):
    def work(config, display):
        raise error

    return work


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BIN / "catsdogs", *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


# Help and version


def test_version_is_that_of_the_package():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"catsdogs {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["--version"], *([command, "--help"] for command in (*REQUIRED, "review", "compare", "export"))],
    ids=" ".join,
)
def test_help_and_version_import_no_slow_packages(arguments):
    code = f"""
import sys
from catsdogs.cli import main
try:
    code = main({arguments})
except SystemExit as done:
    code = done.code
slow = {{"ray", "torch", "torchvision", "numpy", "pyarrow", "fsspec", "botocore", "matplotlib", "jinja2", "PIL"}}
print(code, sorted(slow & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stderr == ""
    assert "catsdogs" in done.stdout.splitlines()[0]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert not [command for command in REQUIRED if command not in shown]
    assert "--verbose" in shown


@pytest.mark.parametrize("module", ["jobs.train", "jobs.score"])
def test_jobs_take_the_flags_of_the_commands(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=BIN.parents[1],
    )
    assert done.returncode == 0
    assert f"usage: catsdogs {module.removeprefix('jobs.')}" in done.stdout


# Flags -> settings


@pytest.mark.parametrize("command", REQUIRED)
def test_only_required_flags_give_the_defaults(runs, command):
    configs = runs(command)
    assert cli.main([command, *REQUIRED[command]]) == 0
    pairs = zip(REQUIRED[command][::2], REQUIRED[command][1::2], strict=True)
    assert configs == [CONFIGS[command](**{flag[2:].replace("-", "_"): value for flag, value in pairs})]


def test_the_two_results_of_compare_are_positional(monkeypatch):
    configs = []
    monkeypatch.setitem(cli.COMMANDS, CompareConfig, lambda config, display: configs.append(config) or 0)
    assert cli.main(["compare", "s3://x/a", "b", "--output", "o", "--fail-if", "changed>0.02"]) == 0
    assert configs == [CompareConfig(a="s3://x/a", b="b", output="o", fail_if="changed>0.02")]


def test_the_class_of_review_is_a_flag(monkeypatch):
    configs = []
    monkeypatch.setitem(cli.COMMANDS, ReviewConfig, lambda config, display: configs.append(config) or 0)
    assert cli.main(["review", "--scores", "s", "--output", "o", "--class", "cat", "--n", "7"]) == 0
    assert configs == [ReviewConfig(scores="s", output="o", class_name="cat", n=7)]


def test_every_flag_is_parsed(runs):
    configs = runs("train")
    flags = (
        "--data-dir s3://b/d --labels l.csv --group-by (x) --exclude e.csv --val-split 0.2 "
        "--storage-path /r --name n --resume --max-failures 1 "
        "--weights none --freeze backbone --views 2 --epochs 3 --batch-size 4 --optimizer adamw --lr 0.5 "
        "--warmup-epochs 0 --weight-decay 0 "
        "--label-smoothing 0 --clip-grad-norm 1 --augment affine --img-size 64 --seed 7 --precision bf16 "
        "--num-workers 2 --use-gpu false"
    )
    assert cli.main(["train", *flags.split()]) == 0
    assert configs == [
        TrainConfig(
            data_dir="s3://b/d",
            labels="l.csv",
            group_by="(x)",
            exclude="e.csv",
            val_split=0.2,
            storage_path="/r",
            name="n",
            resume=True,
            max_failures=1,
            weights="none",
            freeze="backbone",
            views=2,
            epochs=3,
            batch_size=4,
            optimizer="adamw",
            lr=0.5,
            warmup_epochs=0.0,
            weight_decay=0.0,
            label_smoothing=0.0,
            clip_grad_norm=1.0,
            augment="affine",
            img_size=64,
            seed=7,
            precision="bf16",
            num_workers=2,
            use_gpu="false",
        )
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--vers"],
        ["trai", "--data-dir", "d"],
        ["train", "--data-dir"],
        ["train", "--data-dir", "d", "--epo", "3"],
        ["train", "--data", "d"],
        ["train", "--data-dir", "d", "--nosuch", "1"],
        ["train", "--data-dir", "d", "extra"],
        ["train", "--data-dir", "d", "--epochs", "three"],
        ["train", "--data-dir", "d", "--epochs", "1.5"],
        ["train", "--data-dir", "d", "--freeze", "head"],
        ["train", "--data-dir", "d", "--use-gpu", "yes"],
        ["score", "--input", "i", "--checkpoint", "c", "--out", "o"],
        ["score", "--data-dir", "d", "--checkpoint", "c", "--output", "o"],
        [*("score", "--input", "i", "--checkpoint", "c", "--output", "o"), "--min-precision", "high"],
    ],
    ids=" ".join,
)
def test_unknown_shortened_and_malformed_flags_are_errors(runs, capsys, arguments):
    configs = [runs(command) for command in REQUIRED]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert not any(configs)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "--data-dir: expected a folder of class folders, or --labels with a table, got neither"),
        (["evaluate", "--checkpoint", "c", "--output", "o"], "--data-dir: expected a folder of class folders"),
        (["train", "--labels", ""], "--labels: expected a path or URI, got an empty one"),
        (["train", "--labels", "l.csv", "--group-by", "(a{99999999999})"], "the repetition number is too large"),
        (["train", "--labels", "l.csv", "--group-by", "video"], "--group-by: expected a capture in parentheses"),
        (["train", "--labels", "l.csv", "--group-by", "(video"], "--group-by: expected a regular expression"),
        (
            ["evaluate", "--labels", "l.csv", "--checkpoint", "c", "--output", "o", "--group-by", "video"],
            "--group-by: expected a capture in parentheses",
        ),
    ],
)
def test_settings_of_labels_are_checked_first(runs, capsys, arguments, words):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no images under d; check --input"), 2, "catsdogs: no images under d; check --input\n"),
        (RunError("the disk is full"), 1, "catsdogs: the disk is full\n"),
        (
            KeyboardInterrupt(),
            130,
            "catsdogs: interrupted: finished parts are kept; run the same command to resume\n",
        ),
        (
            InputError("no /a\nb\x1b[31m\r\x07/\u202e\ud800é猫"),
            2,
            "catsdogs: no /a\\nb\\x1b[31m\\r\\x07/\\u202e\\ud800é猫\n",
        ),
    ],
)
def test_errors_are_one_line_with_their_exit_code(runs, capsys, error, code, line):
    runs("score", failing(error))
    assert cli.main(["score", *REQUIRED["score"]]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


@pytest.mark.parametrize(
    ("command", "last_line"),
    [
        ("evaluate", "catsdogs: unexpected error, see the traceback above; what is done is kept\n"),
        (
            "score",
            "catsdogs: unexpected error, see the traceback above; finished parts are kept; "
            "run the same command to resume\n",
        ),
        (
            "train",
            "catsdogs: unexpected error, see the traceback above; saved epochs are kept; "
            "to resume, repeat the command with --resume and the --name of the run\n",
        ),
    ],
)
def test_an_unexpected_error_is_a_traceback_and_says_what_is_kept(runs, capsys, command, last_line):
    runs(command, failing(ZeroDivisionError("a bug\x1b[31m")))
    assert cli.main([command, *REQUIRED[command]]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Traceback (most recent call last):\n")
    assert captured.err.endswith("ZeroDivisionError: a bug\\x1b[31m\n" + last_line)


def test_a_setting_out_of_range_is_one_line(capsys):
    assert cli.main(["train", "--data-dir", "d", "--epochs", "0"]) == 2
    assert capsys.readouterr().err == "catsdogs: --epochs: expected at least 1, got 0\n"


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_command_with_their_code(signal_number, code):
    program = """
import signal, sys, time
from catsdogs import cli, config
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background starts without it
def work(config, display):
    print("started", flush=True)
    time.sleep(60)
cli.COMMANDS[config.ScoreConfig] = work
sys.exit(cli.main(["score", "--input", "i", "--checkpoint", "c", "--output", "o"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.count("\n") == 1
    assert "finished parts are kept; run the same command to resume" in errors


@pytest.mark.parametrize(
    "line",
    [
        "with contextlib.suppress(Exception): display(Message('a line'))",  # as a retry does
        "print('a line')",
    ],
    ids=["progress", "result"],
)
def test_a_broken_pipe_ends_the_command_without_a_message(line):
    program = f"""
import contextlib, sys
from catsdogs import cli, config
from catsdogs.progress import Message
def work(config, display):
    for _ in range(100_000):
        {line}
    return 0
cli.COMMANDS[config.ScoreConfig] = work
sys.exit(cli.main(["score", "--input", "i", "--checkpoint", "c", "--output", "o"]))
"""
    words = ["bash", "-c", '"$0" -c "$1" | head -1; exit ${PIPESTATUS[0]}', sys.executable, program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "a line\n", "")


WORK = """
import os, sys
from catsdogs import cli, config
from catsdogs.display import print_result
from catsdogs.errors import InputError
from catsdogs.progress import Message
def work(config, display):
    with open("done", "w") as file:
        assert file.fileno() > 2, "the number of a closed stream: what libraries print would go there"
    display(Message("\\xe9"))
    print_result("\\u65e5\\u672c")
    if len(sys.argv) > 1:
        raise InputError("no \\xe9")
    return 0
cli.COMMANDS[config.ScoreConfig] = work
sys.exit(cli.main(["score", "--input", "i", "--checkpoint", "c", "--output", "o"]))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize(
    "redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "2>&1 >&-"]
)
def test_the_exit_code_is_that_of_the_work_whatever_becomes_of_the_streams(tmp_path, redirection, code):
    command = f'exec "$@" {redirection}'
    words = ["bash", "-c", command, "bash", sys.executable, "-c", WORK, *(["fail"] if code else [])]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "done").exists()
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"\\xe9\n\\u65e5\\u672c\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"\xe9\n\\u65e5\\u672c\n"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"\\xe9\n\\u65e5\\u672c\n"),
        ({"LC_ALL": "C"}, "é\n日本\n".encode()),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(tmp_path, environment, shown):
    command = [sys.executable, "-c", WORK]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, env=os.environ | environment, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


def test_a_lost_sigterm_is_repeated():
    program = """
import sys, time
from catsdogs import cli, config
def work(config, display):
    print("started", flush=True)
    try:
        time.sleep(60)
    except SystemExit:
        pass
    time.sleep(60)
cli.COMMANDS[config.ScoreConfig] = work
cli.SIGTERM_REPEAT_S = 0.3
sys.exit(cli.main(["score", "--input", "i", "--checkpoint", "c", "--output", "o"]))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.wait(timeout=60) == 143


@pytest.mark.parametrize(
    ("rows", "ok", "rate", "code"),
    [(10, 10, 0.0, 0), (10, 9, 0.0, 3), (10, 9, 0.1, 0), (10, 8, 0.1, 3), (10, 1, 1.0, 0), (10, 0, 1.0, 3)],
)
def test_too_many_failed_rows_exit_with_3(monkeypatch, capsys, rows, ok, rate, code):
    from catsdogs.score import pipeline

    by_status = {"ok": ok, "truncated": rows - ok}
    summary = {"rows": rows, "by_status": {s: n for s, n in by_status.items() if n}}
    summary |= {"scored": 7, "images_per_s": 12.34, "limited_by": "read"}
    monkeypatch.setattr(pipeline, "score", lambda config, progress: summary)
    assert cli.main(["score", *REQUIRED["score"], "--max-error-rate", str(rate)]) == code
    captured = capsys.readouterr()
    assert captured.out == (
        f"{rows} rows in o, {rows - ok} not classified (columns status and error); "
        "last run: 7 rows at 12.3 img/s, slowest stage read\n"
    )
    reason = f"catsdogs: {rows - ok} of {rows} images were not classified: see the columns status and error\n"
    assert captured.err == ("" if code == 0 else reason)


# Jobs


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["train", "--data-dir", "d"], "--data-dir d"),
        (["train", "--data-dir", "/d"], "--storage-path runs"),
        (["score", "--input", "s3://b/i", "--checkpoint", "c", "--output", "/o"], "--checkpoint c"),
        (["demo", "--output", "o"], "--output o"),
    ],
)
def test_a_job_refuses_relative_paths(monkeypatch, capsys, runs, arguments, flag):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    configs = runs(arguments[0])
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"catsdogs: {flag}: expected an absolute path that every node sees")
    assert configs == []


def test_a_job_accepts_absolute_paths_and_uris(monkeypatch, runs):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    configs = runs("score")
    assert cli.main(["score", "--input", "s3://b/i", "--checkpoint", "/c", "--output", "file:///o"]) == 0
    assert len(configs) == 1


# Progress and results


def test_control_characters_in_messages_are_escaped(capsys):
    Display()(Message("left out /a\x1b]0;title\x07\nb.jpg: truncated"))
    assert capsys.readouterr().out == "left out /a\\x1b]0;title\\x07\\nb.jpg: truncated\n"


@pytest.mark.parametrize("text", ["", "plain text", "żółć 猫 🐈", "100% 'quoted' \\ back"])
def test_visible_text_is_not_escaped(text):
    assert escape_invisible(text) == text


def test_progress_is_a_line_every_few_seconds_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("catsdogs.display.STARTED_S", -12.5)
    display = Display()
    for i in range(13):
        now[0] = float(i)
        display(StageProgress("score", 1000 * (i + 1), 13000, "1 img/s\x07"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["first batch classified 12.5 s after the start", "score 1,000/13,000  1 img/s\\x07"]
    assert len(lines) == 4


def test_the_time_of_the_first_batch_is_shown_where_nothing_precedes_scoring(capsys):
    display = Display()
    for stage in ("train", "list", "score"):  # as in the demo
        display(StageProgress(stage, 1, 2))
    assert capsys.readouterr().out.splitlines() == ["train 1/2", "list 1/2", "score 1/2"]


def test_progress_is_bars_on_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    every_update = functools.partialmethod(tqdm.__init__, mininterval=0, miniters=1)
    monkeypatch.setattr(tqdm, "__init__", every_update)
    display = Display()
    display(StageProgress("list", 10))
    display(StageProgress("score", 0, 10))
    display(StageProgress("score", 5, 10, "2 img/s"))
    display(StageProgress("score", 10, 10))
    display(StageProgress("score", 1, 10))
    display(Message("a line"))
    display.close()
    shown = sys.stderr.getvalue()
    assert "list: " in shown
    assert "score:  50%" in shown
    assert "2 img/s" in shown
    assert capsys.readouterr().out.splitlines()[1:] == ["a line"]


def test_evaluate_prints_a_json_line_and_a_sentence(monkeypatch, capsys):
    from catsdogs.evaluate import driver

    metrics = {"accuracy": 0.5, "n": 4, "failed": 1, "accuracy_interval_95": [0.15, 0.85]}
    monkeypatch.setattr(driver, "evaluate", lambda config, progress: metrics)
    assert cli.main(["evaluate", *REQUIRED["evaluate"]]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"accuracy": 0.5, "n": 4, "failed": 1}
    assert second == "accuracy 0.5000 (95% interval 0.1500 to 0.8500); all numbers in o/metrics.json"
    metrics |= {"groups": 2, "group_accuracy": 0.25, "group_accuracy_interval_95": [0.1, 0.9]}
    assert cli.main(["evaluate", *REQUIRED["evaluate"]]) == 0
    *_, third = capsys.readouterr().out.splitlines()
    assert third == "accuracy 0.2500 as the mean over 2 groups (95% interval 0.1000 to 0.9000)"


def test_evaluate_exits_with_3_if_every_row_failed(monkeypatch, capsys):
    from catsdogs.evaluate import driver

    metrics = {"accuracy": 0.0, "n": 4, "failed": 4, "accuracy_interval_95": [0.0, 0.5]}
    monkeypatch.setattr(driver, "evaluate", lambda config, progress: metrics)
    assert cli.main(["evaluate", *REQUIRED["evaluate"]]) == 3
    assert capsys.readouterr().err == "catsdogs: 4 of 4 images were not classified: see the columns status and error\n"


def test_the_command_that_download_prints_is_quoted_for_a_shell(monkeypatch, capsys):
    import catsdogs.download

    monkeypatch.setattr(catsdogs.download, "download", lambda *_: "data/cats; rm -r x")
    assert cli.main(["download", *REQUIRED["download"]]) == 0
    assert capsys.readouterr().out == "data/cats; rm -r x: ready for catsdogs train --data-dir 'data/cats; rm -r x'\n"


def test_help_shows_no_secret_of_the_environment():
    done = run("score", "--help", env=os.environ | {"AWS_SECRET_ACCESS_KEY": "very-secret"})
    assert "very-secret" not in done.stdout + done.stderr


def test_sigterm_gives_143_also_where_ray_raises_keyboard_interrupt_instead(runs, capsys):
    def work(config, display):
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            raise KeyboardInterrupt from None

    runs("score", work)
    assert cli.main(["score", *REQUIRED["score"]]) == 143
    assert capsys.readouterr().err == "catsdogs: terminated: finished parts are kept; run the same command to resume\n"


def test_a_second_ctrl_c_does_not_interrupt_the_cleaning_up(runs, monkeypatch, capsys):
    monkeypatch.setattr(start, "stop_ray", lambda: signal.raise_signal(signal.SIGINT))
    runs("score", failing(KeyboardInterrupt()))
    assert cli.main(["score", *REQUIRED["score"]]) == 130
    assert capsys.readouterr().err == "catsdogs: interrupted: finished parts are kept; run the same command to resume\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Logs


@pytest.fixture
def logged(runs, monkeypatch, capsys):
    """Run a command that logs: logged(*arguments) -> the lines of stderr."""

    def work(config, display):
        logger = logging.getLogger("catsdogs.storage.retrying")
        try:
            raise TimeoutError("slow\x1b[31m")
        except TimeoutError:
            logger.debug("attempt %d failed", 1, exc_info=True)
            logger.warning("two\nlines", exc_info=True)
        return 0

    def call(*arguments: str) -> list[str]:
        runs("score", work)
        assert cli.main(list(arguments)) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    return call


def test_warnings_are_one_line_each_and_debug_records_are_hidden(logged):
    assert logged("score", *REQUIRED["score"]) == ["catsdogs: two\\nlines"]


@pytest.mark.parametrize(
    "arguments", [["--verbose", "score", *REQUIRED["score"]], ["score", "--verbose", *REQUIRED["score"]]]
)
def test_verbose_logs_debug_records_with_tracebacks(logged, arguments):
    lines = logged(*arguments)
    assert re.fullmatch(r"[\d-]+ [\d:,]+ DEBUG catsdogs\.storage\.retrying: attempt 1 failed", lines[0])
    assert lines[1] == "Traceback (most recent call last):"
    assert lines.count("TimeoutError: slow\\x1b[31m") == 2


def test_the_environment_switches_debug_logs_on(logged, monkeypatch):
    monkeypatch.setenv("CATSDOGS_LOG", "debug")
    assert "attempt 1 failed" in logged("score", *REQUIRED["score"])[0]


def test_verbose_logs_the_traceback_of_an_expected_error(runs, monkeypatch, capsys):
    runs("score", failing(RunError("the disk is full")))
    assert cli.main(["score", *REQUIRED["score"], "--verbose"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "DEBUG catsdogs.commands: the command failed" in lines[0]
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2:] == ["catsdogs.errors.RunError: the disk is full", "catsdogs: the disk is full"]


def test_a_command_leaves_no_handler_behind(logged):
    before = list(logging.getLogger("catsdogs").handlers)
    logged("score", *REQUIRED["score"])
    assert logging.getLogger("catsdogs").handlers == before


def test_the_library_configures_no_logging():
    code = """
import logging, catsdogs.cli, catsdogs.storage
loggers = [logging.getLogger(), *(logging.getLogger(n) for n in logging.root.manager.loggerDict if "catsdogs" in n)]
print([logger.name for logger in loggers if logger.handlers or logger.level not in (logging.NOTSET, logging.WARNING)])
"""
    environment = os.environ | {"CATSDOGS_LOG": "debug"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("value", "workers_log"), [("", False), ("debug", True)])
def test_workers_log_if_the_command_is_verbose(monkeypatch, value, workers_log):
    monkeypatch.setenv("CATSDOGS_LOG", value)
    assert bool(logs.worker_runtime_env()) == workers_log


def test_workers_run_the_hook_that_logs_debug_records(monkeypatch):
    monkeypatch.setenv("CATSDOGS_LOG", "debug")
    settings = logs.worker_runtime_env()
    assert "env_vars" not in settings  # Ray refuses a variable that the job's own runtime environment has, too
    monkeypatch.delenv("CATSDOGS_LOG")
    level = logging.getLogger("catsdogs").level
    handlers = list(logging.getLogger("catsdogs").handlers)
    try:
        pkgutil.resolve_name(settings["worker_process_setup_hook"])()
        assert logging.getLogger("catsdogs").level == logging.DEBUG
    finally:
        logging.getLogger("catsdogs").setLevel(level)
        logging.getLogger("catsdogs").handlers = handlers


def test_matplotlib_is_silent_where_home_cannot_be_written():
    program = "from catsdogs.logs import configure_logging; configure_logging(); import matplotlib.figure"
    environment = {**os.environ, "HOME": "/proc/nowhere", "CATSDOGS_LOG": ""}
    environment.pop("MPLCONFIGDIR", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
