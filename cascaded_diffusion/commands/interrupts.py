"""Ctrl-C from the first moment on: a binary ends with exit code 130, whatever it is doing.

Python's own answer, a KeyboardInterrupt wherever the program happens to be, is lost where it is
raised in a destructor, and becomes another error where a library guards its imports.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 130
_IMPORTING = "<frozen importlib._bootstrap>"


class Interrupts:
    """Answers SIGINT: at once while the program starts or ends, else by a KeyboardInterrupt.

    At once, too, in the middle of an import, where nothing is open, and the second time.

    Attributes:
      at_once: whether the program starts or ends.
      seen: whether there was a SIGINT.
    """

    def __init__(self) -> None:
        self.at_once = True
        self.seen = False

    def install(self) -> None:
        """Takes SIGINT over, unless whoever started the program has it ignored. Can be repeated."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
            sys.unraisablehook = self._unraisable

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number
        if self.at_once or self.seen or _is_importing(frame):
            end_interrupted()
        self.seen = True
        raise KeyboardInterrupt

    def _unraisable(self, error: Any) -> None:
        """What Python calls for an exception in a destructor, which goes no further."""
        if error.exc_type is KeyboardInterrupt:
            end_interrupted()
        sys.__unraisablehook__(error)


INTERRUPTS = Interrupts()


def end_interrupted() -> None:
    """Ends the process, saying so once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False
