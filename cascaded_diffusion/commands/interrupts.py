"""Ctrl-C from the first moment on: a binary ends with exit code 130, whatever it is doing.

Python raises a KeyboardInterrupt wherever the program happens to be. That is lost if a destructor
runs, and becomes another error if a library guards its imports.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_INTERRUPTED = 130
_ENDING = threading.Lock()
_IMPORTING = "<frozen importlib._bootstrap>"


class Interrupts:
    """Answers SIGINT, either by ending the process at once or by a KeyboardInterrupt.

    The process ends at once while it starts or ends, in the middle of an import, where no file
    is open, and upon a second SIGINT.
    """

    def __init__(self) -> None:
        self.at_once = True  # the program is starting or ending
        self.seen = False  # a SIGINT

    def install(self) -> None:
        """Handles SIGINT, unless the program was started with it ignored. May be called again."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
            sys.unraisablehook = self._unraisable

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number
        if self.at_once or self.seen or _is_importing(frame):
            end_interrupted()
        self.seen = True
        raise KeyboardInterrupt

    def _unraisable(self, error: sys.UnraisableHookArgs) -> None:
        """Python calls this for an exception in a destructor, which cannot propagate."""
        if error.exc_type is KeyboardInterrupt:
            end_interrupted()
        sys.__unraisablehook__(error)


INTERRUPTS = Interrupts()


def end_interrupted() -> None:
    """Ends the process with one line, whichever thread calls it first."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _ENDING.acquire(blocking=False):
        os.write(2, b"interrupted\n")
    else:
        time.sleep(1)  # for the other thread to end the process
    os._exit(EXIT_INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False
