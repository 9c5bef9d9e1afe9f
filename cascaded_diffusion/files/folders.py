"""Folders to write to: whether that is possible, and by one process of a kind at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator

from cascaded_diffusion.errors import UserError


def check_writable(path: pathlib.Path, flag: str) -> None:
    """Raises UserError if the folder cannot be written; leaves no trace."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--{flag}={path}: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise UserError(
            f"--{flag}={path}: cannot write to {parent} ({e.strerror}); choose a"
            " folder that you may write to"
        ) from e


@contextlib.contextmanager
def held_lock(path: pathlib.Path, role: str, flag: str) -> Iterator[pathlib.Path]:
    """Holds a folder for one writer of a kind. Yields the lock's file.

    The lock is the operating system's, so it ends with the process that holds it, however that
    ends. Raises UserError if another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = path / f".{role}.lock"
    with lock.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.seek(0)
            holder = f.read().strip() or "unknown"
            raise UserError(
                f"--{flag}={path}: another {role} process (pid {holder}) is writing"
                " there; wait for it, or choose another folder"
            ) from e
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield lock
