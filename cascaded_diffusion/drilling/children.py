"""Binaries in processes of their own, forked so that their imports are there already.

JAX may be imported in the process that forks, but not have touched a device.
"""

import dataclasses
import importlib
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence

from cascaded_diffusion.commands import entry

_POLL_SECS = 0.005
_RUNNING: set["Child"] = set()


def kill_all() -> None:
    """Kills what still runs."""
    for child in list(_RUNNING):
        child.signal(signal.SIGKILL)
        child.wait()


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    code: int  # negative: the signal's number
    secs: float
    text: str  # what it printed


class Child:
    """A running binary. Its output goes to a file."""

    def __init__(
        self,
        binary: str,
        argv: Sequence[str],
        log: pathlib.Path,
        prepare: Callable[[], None] | None = None,
    ):
        """`prepare` is called in the new process first."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._log, self._start = log, time.monotonic()
        self._ended: Ended | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(binary, argv, prepare)
        _RUNNING.add(self)

    def _run(self, binary: str, argv: Sequence[str], prepare: Callable[[], None] | None) -> None:
        try:
            os.setsid()
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.argv = [binary, *argv]
            if prepare is not None:
                prepare()
            if binary == "main":
                entry.end_at_once_before_training()
            else:
                entry.end_at_once_upon_sigterm()
            entry.run(importlib.import_module(f"cascaded_diffusion.{binary}").main)
        except SystemExit as e:
            sys.stdout.flush()
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(1)

    def text(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def poll(self) -> Ended | None:
        """How it has ended, or None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._ended = Ended(code, time.monotonic() - self._start, self.text())
                _RUNNING.discard(self)
        return self._ended

    def wait(self, secs: float = 300.0) -> Ended:
        """Waits for the end. A process that takes longer is killed."""
        deadline = time.monotonic() + secs
        while (ended := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                deadline = float("inf")
            time.sleep(_POLL_SECS)
        return ended

    def wait_for(self, condition: Callable[[], bool], secs: float = 120.0) -> bool:
        """Waits until a condition holds. False if the process has ended before, or time is up."""
        deadline = time.monotonic() + secs
        while not condition():
            if self.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECS)
        return True

    def signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self._ended is None:
            os.kill(self.pid, number)
