"""Checkpoints that are being read are pinned, so that the trainer does not delete them.

A pin is a locked file in RUN/eval/reading, so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Iterator

from cascaded_diffusion.runtime.manifest import is_finished
from cascaded_diffusion.runtime.run_folder import RunFolder

# The step, the process and a random number.
_PIN = re.compile(r"([0-9]+)\.[0-9]+\.[0-9a-f]{32}")


@contextlib.contextmanager
def _lock(folder: RunFolder) -> Iterator[None]:
    with (folder.path / ".reading.lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def pinned(folder: RunFolder, step: int) -> Iterator[bool]:
    """Keeps the trainer from deleting a checkpoint while it is read.

    Yields whether the checkpoint is there, since the trainer may have been faster. If the run
    folder is read-only, the checkpoint is not pinned.
    """
    with contextlib.ExitStack() as stack:
        try:
            with _lock(folder):
                folder.reading.mkdir(parents=True, exist_ok=True)
                pin = folder.reading / f"{step}.{os.getpid()}.{uuid.uuid4().hex}"
                held = stack.enter_context(pin.open("w"))
                fcntl.flock(held, fcntl.LOCK_EX)
                stack.callback(pin.unlink, missing_ok=True)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        yield is_finished(folder, step)


@contextlib.contextmanager
def pinned_steps(folder: RunFolder) -> Iterator[set[int]]:
    """The steps that are being read. While the context is open, no further reader begins."""
    with _lock(folder):
        steps = set()
        for pin in folder.reading.iterdir() if folder.reading.is_dir() else ():
            named = _PIN.fullmatch(pin.name)
            if named is None:  # somebody else's file
                continue
            # A reader that finishes removes its pin without the lock.
            with contextlib.suppress(FileNotFoundError), pin.open() as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    steps.add(int(named[1]))
                else:  # its reader was killed
                    pin.unlink()
        yield steps
