"""Lines in a bucket: `metrics.jsonl` as numbered objects below that name, readable as one.

    metrics.jsonl/0001.000000.jsonl    the first part of the first version
    metrics.jsonl/0001.000001.jsonl    what was appended when that was full

An object cannot be appended to. A line is appended by writing the last part anew, up to a size,
and then the next part. A file is written anew by one object, the first of the next version: who
reads takes the newest version, so that it changes in one instant. Older versions are then removed.
A plain object of that name, as of a copied run, is version 0. A run that was copied to a disk has
the parts there, in a folder of that name; they become one file when something is written.
"""

import os
import pathlib
import re
import shutil
import time

from cascaded_diffusion.files.bucket import ABSENT, AnyPath, BucketPath, OverwrittenError
from cascaded_diffusion.files.whole import write_whole

_PART = re.compile(r"([0-9]{4,9})\.([0-9]{6,9})\.jsonl")
_MAX_BYTES = 1 << 16
# Cloud Storage slows down who writes one object more than once a second.
_MIN_SECS = 1.0


class _Tail:
    """The last part of a file, as this process has left it."""

    def __init__(self, version: int, number: int, data: bytes, generation: bytes):
        self.version, self.number = version, number
        self.data, self.generation = data, generation
        self.written = float("-inf")


# A file has one writer, which holds its folder's lock.
_TAILS: dict[BucketPath, _Tail] = {}


def forget(folder: BucketPath) -> None:
    """Begins new parts in all files below a folder, as another process does."""
    for path in [path for path in _TAILS if path.is_relative_to(folder)]:
        del _TAILS[path]


def _part(path: AnyPath, version: int, number: int) -> AnyPath:
    return path / f"{version:04d}.{number:06d}.jsonl"


def _parts(path: AnyPath) -> list[tuple[int, int]]:
    found = (_PART.fullmatch(part.name) for part in path.iterdir())
    return sorted((int(m[1]), int(m[2])) for m in found if m is not None)


def _newest(path: AnyPath) -> tuple[int, list[int]]:
    """The newest version and its parts; version 0 where there is none."""
    parts = _parts(path)
    version = parts[-1][0] if parts else 0
    return version, [number for v, number in parts if v == version]


def is_folder(path: pathlib.Path) -> bool:
    """Whether lines on a disk are parts, of a run that was copied from a bucket."""
    return path.is_dir() and bool(_parts(path))


def join(path: pathlib.Path) -> None:
    """Makes one file of parts on a disk, if that is what is there."""
    if not is_folder(path):
        return
    whole, parts = path.with_name(f".{path.name}.whole"), path.with_name(f".{path.name}.parts")
    write_whole(whole, read(path))
    os.replace(path, parts)
    os.replace(whole, path)
    shutil.rmtree(parts)


def read(path: AnyPath) -> bytes:
    """All lines; nothing if there are none."""
    while True:
        version, numbers = _newest(path)
        try:
            data = [path.read_bytes()] if not version and path.is_file() else []
            data += [_part(path, version, number).read_bytes() for number in numbers]
        except FileNotFoundError:  # a newer version has replaced it meanwhile
            continue
        if not data and _newest(path)[0]:  # by now
            continue
        return b"".join(x if x.endswith(b"\n") or not x else x + b"\n" for x in data)


def append(path: BucketPath, line: bytes) -> None:
    """Appends a line, durably. Raises OverwrittenError if another process has written there."""
    tail = _TAILS.get(path)
    if tail is None:
        version, numbers = _newest(path)
        tail = _Tail(version, numbers[-1] + 1 if numbers else 0, b"", ABSENT)
    elif len(tail.data) + len(line) > _MAX_BYTES or time.monotonic() - tail.written < _MIN_SECS:
        tail = _Tail(tail.version, tail.number + 1, b"", ABSENT)
    part = _part(path, tail.version, tail.number)
    try:
        tail.generation = part.write_versioned(tail.data + line, tail.generation)
    except OverwrittenError:
        _TAILS.pop(path, None)
        raise
    tail.data, tail.written = tail.data + line, time.monotonic()
    _TAILS[path] = tail


def write(path: BucketPath, data: bytes) -> None:
    """Replaces all lines, in one instant."""
    version = _newest(path)[0] + 1
    _TAILS.pop(path, None)
    _part(path, version, 0).write_versioned(data, ABSENT)
    path.unlink(missing_ok=True)
    for old, number in _parts(path):
        if old < version:
            _part(path, old, number).unlink(missing_ok=True)
