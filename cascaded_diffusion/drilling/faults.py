"""The points at which a process can be killed: before and after whatever makes files appear.

Files appear, move and disappear by `os.replace`, `os.rename`, `os.fsync` and `shutil.rmtree`. In a
process under drill these are wrapped; the package itself knows nothing of it.
"""

import dataclasses
import errno
import functools
import os
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Numbers of steps, parts and processes, and names that are drawn.
_NUMBERS = re.compile(r"\d+")
_DRAWN = re.compile(r"[0-9a-f]{32}|orbax-checkpoint-tmp\S*")


@dataclasses.dataclass(frozen=True)
class Point:
    """A place in a program: an operation, on which file, and on which side of it."""

    side: str  # "before" or "after"
    operation: str
    file: str  # below the run folder, numbers as N

    def __str__(self) -> str:
        return f"{self.side} {self.operation} {self.file}"


def _label(path: object, root: pathlib.Path) -> str | None:
    """A file's name below the run folder, the same for all steps; None if it lies elsewhere."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    found = pathlib.Path(os.path.abspath(os.fspath(path)))
    if not found.is_relative_to(root):
        return None
    name = found.relative_to(root).as_posix()
    return _NUMBERS.sub("N", _DRAWN.sub("*", name))


def install(
    root: pathlib.Path,
    *,
    kill_at: Point | None = None,
    full_at: Point | None = None,
    seen: pathlib.Path | None = None,
) -> None:
    """Wraps the operations in this process, for files below `root`.

    The process kills itself at the point `kill_at`, and there is no space left on the device at
    the point `full_at`. Points that it passes are lines of the file `seen`.
    """
    root = pathlib.Path(os.path.abspath(root))
    known: set[Point] = set()

    def passes(point: Point) -> None:
        if point == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if point == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if seen is not None and point not in known:
            known.add(point)
            with seen.open("a") as f:
                f.write(f"{point.side}\t{point.operation}\t{point.file}\n")

    def wrapped(name: str, which: int, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            label = _label(args[which], root) if len(args) > which else None
            # What is written under a temporary name is named when it is renamed.
            if label is None or ("/." in f"/{label}" and name == "fsync"):
                return function(*args, **kwargs)
            passes(Point("before", name, label))
            result = function(*args, **kwargs)
            passes(Point("after", name, label))
            return result

        return call

    for name, which in (("replace", 1), ("rename", 1), ("fsync", 0)):
        setattr(os, name, wrapped(name, which, getattr(os, name)))
    shutil.rmtree = wrapped("rmtree", 0, shutil.rmtree)


def signal_in(owner: Any, name: str, number: int, at: pathlib.Path) -> None:
    """Has this process send itself a signal when a function is called the first time.

    The moment, of `time.monotonic`, is written to the file `at`.
    """
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        if not at.exists():
            at.write_text(repr(time.monotonic()))
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, call)


def read_points(seen: pathlib.Path) -> list[Point]:
    """The points that `install` has noted, in the order in which they were passed."""
    lines = seen.read_text().splitlines() if seen.exists() else []
    return [Point(*line.split("\t")) for line in lines]
