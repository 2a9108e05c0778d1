"""Progress of a command on the terminal. Only this module and `cli` print."""

import sys
import time
from typing import Any

from catsdogs.progress import Message, StageProgress
from catsdogs.text import format_line

STARTED_S = time.monotonic()
LINE_INTERVAL_S = 5.0  # between progress lines without a terminal


class BrokenPipeExit(SystemExit):
    """Broken pipe (`| head`). Not an `Exception`, so that no retry catches it."""


class Display:
    """Shows progress: bars on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: dict[str, Any] = {}
        self._last_line_s: dict[str, float] = {}
        self._scored = False

    def __call__(self, event: StageProgress | Message) -> None:
        """Show one event."""
        if isinstance(event, StageProgress) and event.stage == "score" and not self._scored:
            self._scored = True
            self._print(f"first batch labelled {time.monotonic() - STARTED_S:.1f} s after the start")
        if isinstance(event, Message):
            self._print(event.text)
        elif self._terminal:
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
        try:
            print(format_line(text), flush=True)
        except BrokenPipeError as error:
            raise BrokenPipeExit from error

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
