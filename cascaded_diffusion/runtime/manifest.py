"""Which checkpoints are complete, which were damaged since, and which are being read.

A manifest holds the step and the SHA-256 of each file of a checkpoint. It is written last, so a
checkpoint without one was never completed.

Checkpoints that are being read are pinned, so that the trainer does not delete them. A pin is a
locked file in RUN/eval/reading, so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import uuid
from collections.abc import Iterator
from typing import Any

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_record
from cascaded_diffusion.files.whole import sha256_of, write_whole
from cascaded_diffusion.runtime.run_folder import RunFolder

MANIFEST = "manifest.json"
NEVER_COMPLETED = f"{MANIFEST} is missing: it was never completed"
# A pin's name: the step, the process and a random number.
_PIN = re.compile(r"([0-9]+)\.[0-9]+\.[0-9a-f]{32}")


def _file_hashes(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def write_manifest(folder: pathlib.Path, step: int) -> None:
    """Records the step and the SHA-256 of every file of a finished checkpoint."""
    manifest = {"step": step, "sha256": _file_hashes(folder)}
    write_whole(folder / MANIFEST, json.dumps(manifest).encode())


def read_manifest(folder: RunFolder, step: int) -> bytes:
    """The manifest of a checkpoint: the checksums of all that it holds."""
    return (folder.checkpoints / str(step) / MANIFEST).read_bytes()


def _manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, or None without one. Those of older versions lack the step."""
    try:
        return read_record(folder / MANIFEST, {"sha256": dict})
    except UserError:
        return None


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the checkpoint in a folder named by its step, briefly, or None."""
    if not (folder / MANIFEST).exists():
        return NEVER_COMPLETED
    manifest = _manifest(folder)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    expected, step = manifest["sha256"], manifest.get("step", int(folder.name))
    if step != int(folder.name):
        return f"it is a copy of checkpoint {step}"
    found = _file_hashes(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        if expected[name] != found[name]:
            return f"{name} has changed since it was written"
    return None


def is_step_name(name: str) -> bool:
    """Whether a checkpoint's folder may have this name: a step in plain decimals."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def steps_on_disk(folder: RunFolder) -> list[int]:
    """Steps that have a folder, ascending. They need not be intact."""
    if not folder.checkpoints.is_dir():
        return []
    return sorted(int(p.name) for p in folder.checkpoints.iterdir() if is_step_name(p.name))


def finished_steps(folder: RunFolder) -> list[int]:
    """Steps with a complete checkpoint, ascending. For readers beside a live trainer."""
    return [step for step in steps_on_disk(folder) if is_finished(folder, step)]


def is_finished(folder: RunFolder, step: int) -> bool:
    """Whether a step has a complete checkpoint. A copy of another step's does not count."""
    manifest = _manifest(folder.checkpoints / str(step))
    return manifest is not None and manifest.get("step", step) == step


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
