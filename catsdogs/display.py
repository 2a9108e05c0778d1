"""Lines and progress of a command on the terminal. Only this module prints."""

import io
import logging
import os
import sys
import threading
import time
from typing import Any

from catsdogs.progress import Message, StageProgress
from catsdogs.text import format_line

STARTED_S = time.monotonic()
LINE_INTERVAL_S = 5.0  # between progress lines without a terminal

logger = logging.getLogger(__name__)


class BrokenPipeExit(SystemExit):
    """Broken pipe (`| head`). Not an `Exception`, so that no retry catches it."""


def open_streams() -> None:
    """Open streams that the shell closed as /dev/null, and escape what stdout cannot encode.

    Else a file that is opened later gets the number of a closed stream, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it


def print_result(text: str) -> None:
    """Print to stdout; if that fails, as on a full disk, print nothing more there. BrokenPipeExit if no one reads."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise BrokenPipeExit from error
        logger.warning("stdout: %s", error.strerror)


def print_error(text: str) -> None:
    """Print to stderr, if that is possible."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Display:
    """Shows progress: bars on a terminal, else a line every few seconds. Any thread may call it."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: dict[str, Any] = {}
        self._last_line_s: dict[str, float] = {}
        self._stages: set[str] = set()  # that were shown
        self._lock = threading.Lock()

    def __call__(self, event: StageProgress | Message) -> None:
        """Show one event."""
        with self._lock:
            self._show(event)

    def _show(self, event: StageProgress | Message) -> None:
        if isinstance(event, Message):
            self._print(event.text)
            return
        if event.stage == "score" and self._stages <= {"list"}:  # not in the demo, where training comes first
            self._print(f"first batch classified {time.monotonic() - STARTED_S:.1f} s after the start")
        self._stages.add(event.stage)
        if self._terminal:
            self._update_bar(event)
        else:
            self._print_stage(event)

    def close(self) -> None:
        """Remove the bars."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def _print(self, text: str) -> None:
        for bar in self._bars.values():
            bar.clear()
        print_result(format_line(text))

    def _update_bar(self, event: StageProgress) -> None:
        from tqdm import tqdm

        bar = self._bars.get(event.stage)
        if bar is None or event.done < bar.n:
            if bar is not None:
                bar.close()
            bar = self._bars[event.stage] = tqdm(
                total=event.total, desc=event.stage, unit=" images", leave=False, dynamic_ncols=True
            )
        bar.total = event.total
        bar.set_postfix_str(event.note, refresh=False)
        bar.update(event.done - bar.n)

    def _print_stage(self, event: StageProgress) -> None:
        now_s = time.monotonic()
        if now_s - self._last_line_s.get(event.stage, -LINE_INTERVAL_S) >= LINE_INTERVAL_S:
            self._last_line_s[event.stage] = now_s
            total = "" if event.total is None else f"/{event.total:,}"
            self._print(f"{event.stage} {event.done:,}{total}" + (f"  {event.note}" if event.note else ""))
