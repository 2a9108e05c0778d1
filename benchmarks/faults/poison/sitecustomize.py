"""On PYTHONPATH of a run: the marked PNG kills the process that opens it with Pillow.

It dies of SIGSEGV, as libpng in torchvision 0.29 does on the damage of that file.
"""

import os
import signal
from typing import Any

from PIL import PngImagePlugin

MARK = b"catsdogs-poison"
_original_open = PngImagePlugin.PngImageFile._open


def _open_or_die(file: Any) -> None:
    start = file.fp.tell()
    content = file.fp.read()
    file.fp.seek(start)
    if MARK in content:
        os.kill(os.getpid(), signal.SIGSEGV)
    _original_open(file)


PngImagePlugin.PngImageFile._open = _open_or_die  # type: ignore[assignment,method-assign]
