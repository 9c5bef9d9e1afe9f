"""A training that hangs ends by itself, so that a launch script can run it again."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Self

from cascaded_diffusion.errors import EXIT_TRY_AGAIN

_DEFAULT_SECS = 1800.0


class HangWatch:
    """While it is open, ends this process if `begin` is not called for so many seconds.

    Before, the stacks of all threads are written to stderr, and a line that says what was begun
    last. None stands for half an hour.
    """

    def __init__(self, secs: float | None):
        self._secs = _DEFAULT_SECS if secs is None else secs
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)

    def __enter__(self) -> Self:
        self.begin("the first step")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join()

    def begin(self, what: str) -> None:
        """Says that what was begun before has ended, and what begins now."""
        self._what, self._last = what, time.monotonic()

    def _run(self) -> None:
        while (left := self._last + self._secs - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        faulthandler.dump_traceback(2, all_threads=True)
        line = (
            f"error: {self._what}: not done after {self._secs:g} s (config.train.hang_secs); the"
            " stacks of all threads are above; run the same command again\n"
        )
        os.write(2, line.encode())
        os._exit(EXIT_TRY_AGAIN)
