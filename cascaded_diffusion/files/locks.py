"""Locks: a folder has one writer of a kind, and what is being read is not deleted.

On a file system a lock is the operating system's and ends with its process. In a bucket it is an
object that its holder writes anew every few seconds, each time expecting the generation that it
wrote last. Who wants the lock watches: an object that changes has a living holder; one that has not
changed for `LEASE_SECS` is taken over, by a write that expects just that generation. No clock of
one machine is compared with that of another.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Protocol

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files import line_parts
from cascaded_diffusion.files.bucket import (
    ABSENT,
    PATIENCE_SECS,
    AnyPath,
    BucketPath,
    OverwrittenError,
)
from cascaded_diffusion.files.json_files import Record

LEASE_SECS = 20.0
_BEAT_SECS, _POLL_SECS = 3.0, 0.5


class Held(Protocol):
    """A lock that this process holds."""

    def is_lost(self) -> bool:
        """Whether it, or the folder that it is in, was taken away."""
        ...


@contextlib.contextmanager
def held_lock(path: AnyPath, role: str, flag: str) -> Iterator[Held]:
    """Holds a folder for one writer of a kind. Raises UserError if another process does."""
    name = f".{role}.lock"
    opened = _leased(path / name) if isinstance(path, BucketPath) else _flocked(path, name)
    with opened as (lock, holder):
        if lock is None:
            raise UserError(
                f"--{flag}={path}: another {role} process ({holder}) is writing there; wait for it,"
                " or choose another folder"
            )
        yield lock


class _FileLock:
    def __init__(self, path: AnyPath):
        self._path, self._inode = path, path.stat().st_ino

    def is_lost(self) -> bool:
        with contextlib.suppress(OSError):
            return self._path.stat().st_ino != self._inode
        return True


@contextlib.contextmanager
def _flocked(folder: AnyPath, name: str) -> Iterator[tuple[Held | None, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / name
    with lock.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            yield None, f"pid {f.read().strip() or 'unknown'}"
            return
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield _FileLock(lock), ""


@contextlib.contextmanager
def _leased(path: BucketPath) -> Iterator[tuple[Held | None, str]]:
    generation, holder = _await_free(path)
    if generation is None:
        yield None, holder
        return
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(Lease(path, expected=generation))
        except OverwrittenError:
            yield None, "which was faster"
            return
        # What this process wrote when it held the lock before may have been changed since.
        line_parts.forget(path.parent)
        yield lease, ""


def _await_free(path: BucketPath) -> tuple[bytes | None, str]:
    """The generation to take over, or None if a living process, which is named, has the lock."""
    data, first = path.read_versioned()
    generation, start = first, time.monotonic()
    said = False
    while generation != ABSENT and not _is_dead(data):
        if generation != first:
            return None, _named(data)
        if time.monotonic() - start > LEASE_SECS:
            break
        if not said and time.monotonic() - start > 2 * _BEAT_SECS:
            said = True
            print(
                f"{path}: held by {_named(data)}; waiting up to {LEASE_SECS:.0f} s to see whether"
                " that process is alive",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_SECS)
        data, generation = path.read_versioned()
    return generation, ""


class Lease:
    """An object that says, as long as it changes, that its process is alive.

    Raises OverwrittenError upon entry unless the object is of the generation `expected`.
    """

    def __init__(self, path: BucketPath, *, expected: bytes = ABSENT):
        self._path, self._generation = path, expected
        self._about = {**_this_process(), "token": uuid.uuid4().hex}
        self._beats, self._lost, self._last = 0, False, 0.0
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._end.set()
        self._thread.join()
        # Where the storage cannot be reached, the lock ends by itself.
        with self._lock, contextlib.suppress(OSError):
            if not self._lost:
                self._path.write_versioned(None, self._generation, secs=LEASE_SECS / 2)

    def is_lost(self) -> bool:
        """Whether another process may have it. Asks the storage if this one has slept.

        While the storage does not answer, nothing can be written either, so it is waited for.
        Raises OSError after `PATIENCE_SECS`.
        """
        start = time.monotonic()
        while True:
            with self._lock:
                if self._lost or time.monotonic() - self._last <= LEASE_SECS / 2:
                    return self._lost
                try:
                    self._beat_once()
                except OSError:
                    if time.monotonic() - start > PATIENCE_SECS:
                        raise
            time.sleep(_POLL_SECS)

    def _keep(self) -> None:
        while not self._end.wait(_BEAT_SECS):
            with self._lock:
                if self._lost:
                    return
                # The next beat may succeed; until then `is_lost` asks again.
                with contextlib.suppress(OSError):
                    self._beat_once()

    def _beat_once(self) -> None:
        try:
            self._beat()
        except OverwrittenError:
            self._lost = True

    def _beat(self) -> None:
        self._beats += 1
        data = json.dumps({**self._about, "beats": self._beats}).encode()
        # Others count from when it is written, which is before it is answered.
        now, secs = time.monotonic(), LEASE_SECS / 2
        try:
            self._generation = self._path.write_versioned(data, self._generation, secs=secs)
        except OverwrittenError:
            found, generation = self._path.read_versioned()
            if _holder(found).get("token") != self._about["token"]:
                raise
            self._generation = generation  # an earlier beat, whose answer never came
            return
        self._last = now


def _this_process() -> Record:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        # Two processes of the same machine, and not in different containers, see each other's pid.
        "sees": _read("/proc/sys/kernel/random/boot_id") + _link("/proc/self/ns/pid"),
    }


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as f:
        return f.read().strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _holder(data: bytes | None) -> Record:
    try:
        about = json.loads(data or b"")
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _named(data: bytes | None) -> str:
    about = _holder(data)
    return f"host {about.get('host', 'unknown')}, pid {about.get('pid', 'unknown')}"


def _is_dead(data: bytes | None) -> bool:
    """Whether the holder ran on this machine and is gone. What cannot be known is False."""
    about, here = _holder(data), _this_process()
    if not here["sees"] or about.get("sees") != here["sees"] or about.get("host") != here["host"]:
        return False
    pid = about.get("pid")
    if not isinstance(pid, int) or pid == here["pid"]:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
