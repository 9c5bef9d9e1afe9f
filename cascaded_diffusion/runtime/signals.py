"""SIGTERM and SIGINT to a process that has nothing to save, or not yet: it ends at once.

Python calls a handler between two of its own instructions, for which a compilation makes it wait
for minutes. And JAX, by which several processes agree on the step to stop at, puts its own handler
in the place of Python's. So a thread reads signals as they come, in a trainer until the first step
begins.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_SIG_IGN = 1  # from signal.h


def ignore(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM meanwhile."""
    del number, frame  # the thread has been told


class StartSignals:
    """Calls a function, in a thread, upon SIGTERM or SIGINT, until `end` is called."""

    def __init__(self) -> None:
        self._pipe: int | None = None  # where Python writes the numbers of signals
        self._handler_of_jax: int | None = None

    def install(self, on_signal: Callable[[int], None]) -> None:
        """Called in the main thread. A signal that the process was started to ignore stays so."""
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
            return
        source, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, ignore)

        def wait() -> None:
            with os.fdopen(source, "rb", buffering=0) as signals:
                while number := signals.read(1):
                    if number[0] in (signal.SIGTERM, signal.SIGINT):
                        on_signal(number[0])

        threading.Thread(target=wait, name="start signals", daemon=True).start()

    def set_aside_handler_of_jax(self) -> None:
        """Called after JAX has connected the processes, and installed its handler of SIGTERM."""
        if self._pipe is not None:
            self._handler_of_jax = _set_handler(_SIG_IGN)
            signal.signal(signal.SIGTERM, ignore)

    def end(self) -> None:
        """From here on signals are for others to handle, JAX's handler of SIGTERM for one.

        Another handler is set before, so that no signal is lost.
        """
        if self._pipe is None:
            return
        if self._handler_of_jax is not None:
            _set_handler(self._handler_of_jax)
        signal.set_wakeup_fd(-1)
        os.close(self._pipe)
        self._pipe = None


def _set_handler(handler: int) -> int:
    """Sets SIGTERM's handler by its address, which Python cannot, and returns the former one."""
    libc_signal = ctypes.CDLL(None).signal
    libc_signal.argtypes, libc_signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return libc_signal(signal.SIGTERM, handler) or 0


START_SIGNALS = StartSignals()
