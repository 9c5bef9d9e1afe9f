"""Which checkpoints are complete, damaged or being read, and from which one a run resumes.

A manifest holds the step and the SHA-256 of each file of a checkpoint. It is written last, so a
checkpoint without one was never completed.

A checkpoint that is being read is pinned, so that the trainer does not delete it. A pin is a locked
file in RUN/eval/reading, so it ends with its process, however that ends. In a bucket it is a
`Lease`, and the trainer first announces which checkpoints it is about to delete: a reader that has
pinned one and finds no announcement is seen by the trainer, which looks for pins afterwards.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.json_files import Record, readable_record, write_json
from cascaded_diffusion.files.locks import LEASE_SECS, Lease
from cascaded_diffusion.files.whole import files_below, move, remove_tree, sha256_of
from cascaded_diffusion.runtime.run_folder import RunFolder

MANIFEST = "manifest.json"
NEVER_COMPLETED = f"{MANIFEST} is missing: it was never completed"
# A pin's name: the step, the process and a random number.
_PIN = re.compile(r"([0-9]+)\.[0-9]+\.[0-9a-f]{32}")


def _file_hashes(folder: AnyPath) -> dict[str, str]:
    files = files_below(folder)
    return {name: sha256_of(path) for name, path in files.items() if path.name != MANIFEST}


def write_manifest(folder: AnyPath, step: int) -> None:
    """Records the step and the SHA-256 of every file of a finished checkpoint."""
    write_json(folder / MANIFEST, {"step": step, "sha256": _file_hashes(folder)}, indent=None)


def _manifest(folder: AnyPath) -> Record | None:
    """A checkpoint's manifest, or None without one. Those of older versions lack the step."""
    return readable_record(folder / MANIFEST, {"sha256": dict})


def damage(folder: AnyPath) -> str | None:
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
    pin = folder.reading / f"{step}.{os.getpid()}.{uuid.uuid4().hex}"
    with contextlib.ExitStack() as stack:
        if isinstance(pin, BucketPath):
            with contextlib.suppress(PermissionError):
                stack.enter_context(Lease(pin))
            yield not _is_announced(folder, step) and is_finished(folder, step)
            return
        try:
            with _lock(folder):
                folder.reading.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(pin.open("w"))
                fcntl.flock(held, fcntl.LOCK_EX)
                stack.callback(pin.unlink, missing_ok=True)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        yield is_finished(folder, step)


@contextlib.contextmanager
def deletable(folder: RunFolder, steps: Iterable[int]) -> Iterator[set[int]]:
    """Those of some steps that nobody reads; until the context ends, no reader of them begins."""
    wanted = set(steps)
    if isinstance(folder.path, BucketPath):
        with contextlib.ExitStack() as stack:
            for step in wanted:
                path = _announcement(folder, step)
                stack.enter_context(Lease(path, expected=path.read_versioned()[1]))
            yield wanted and wanted - _leased_steps(folder)
        return
    with _lock(folder):
        for pin in folder.reading.iterdir() if folder.reading.is_dir() else ():
            named = _PIN.fullmatch(pin.name)
            if named is None:  # somebody else's file
                continue
            # A reader that finishes removes its pin without the lock.
            # NFS locks exclusively only what is open for writing.
            with contextlib.suppress(FileNotFoundError), pin.open("r+") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    wanted.discard(int(named[1]))
                else:  # its reader was killed
                    pin.unlink()
        yield wanted


def _announcement(folder: RunFolder, step: int) -> AnyPath:
    return folder.reading / f"{step}.deleting"


def forget_announcements(folder: RunFolder) -> None:
    """Takes back what a trainer announced that was killed before it deleted anything."""
    if isinstance(folder.path, BucketPath):
        for path in folder.reading.glob("*.deleting"):
            path.unlink(missing_ok=True)


# Generations of leases in a bucket, and when this process first saw them.
_SEEN: dict[BucketPath, tuple[bytes, float]] = {}


def _is_alive(lease: BucketPath) -> bool:
    """Whether a lease is there and has changed within the time that this process has looked."""
    now = time.monotonic()
    data, generation = lease.read_versioned()
    if data is None:
        _SEEN.pop(lease, None)
        return False
    first, since = _SEEN.get(lease, (generation, now))
    _SEEN[lease] = (generation, since if first == generation else now)
    return first != generation or now - since <= LEASE_SECS


def _is_announced(folder: RunFolder, step: int) -> bool:
    """Whether a trainer that lives is about to delete a checkpoint."""
    return _is_alive(_announcement(folder, step))


def _leased_steps(folder: RunFolder) -> set[int]:
    """The steps that are being read in a bucket. Pins of readers that were killed are removed."""
    steps = set()
    for pin in folder.reading.iterdir():
        if (named := _PIN.fullmatch(pin.name)) is None:
            continue
        if _is_alive(pin):
            steps.add(int(named[1]))
        else:
            _SEEN.pop(pin, None)
            pin.unlink(missing_ok=True)
    return steps


def newest_intact(folder: RunFolder, *, start_over: bool, say: Callable[[str], None]) -> int | None:
    """The step to restore, or None to begin at step 0. Damaged newer checkpoints are set aside.

    Raises UserError if no checkpoint is intact, though there are some or the rest of the folder
    shows that there were: only the user may throw a run away. With `start_over` the run begins at
    step 0 all the same, and what the lost one has left is moved to `lost_run_N/`. `say` is told
    what was set aside and why.
    """
    _set_misnamed_aside(folder, say)
    steps = steps_on_disk(folder)
    problems: dict[int, str] = {}
    for step in reversed(steps):
        if (problem := damage(folder.checkpoints / str(step))) is None:
            break
        problems[step] = problem
    intact = len(problems) < len(steps)
    if not intact and not start_over:
        _check_nothing_is_lost(folder, problems)
    for bad, problem in problems.items():
        # With none intact, the very first save was cut off: nothing was kept yet.
        remedy = "falling back to the one before" if intact else "starting at step 0"
        say(f"checkpoint {bad} is damaged ({problem}); {remedy}")
        _set_aside(folder, folder.checkpoints / str(bad))
    if not intact and start_over and (moved := _set_lost_run_aside(folder)) is not None:
        say(f"starting over at step 0; what the lost run has left is in {moved}")
    return step if intact else None


def _check_nothing_is_lost(folder: RunFolder, problems: dict[int, str]) -> None:
    damaged = {k: v for k, v in problems.items() if v != NEVER_COMPLETED}
    if damaged:
        newest, why = max(damaged.items())
        problem = f"none of the checkpoints {sorted(problems)} is intact ({newest}: {why})"
    elif (proof := _proof_of_steps(folder)) is not None:
        problem = f"no checkpoint is there that was completed, but {proof}"
    else:
        return
    raise UserError(
        f"{folder.checkpoints}: {problem}; restore the folder from a backup, choose another"
        " --workdir, or add --start_over to begin at step 0 here"
    )


def _proof_of_steps(folder: RunFolder) -> str | None:
    """What shows that a checkpoint was once completed here, in a few words, or None."""
    if folder.saved_path.exists():
        return f"{folder.saved_path.name} says that one was"
    if folder.complete_path.exists():
        return f"{folder.complete_path.name} says that the run has ended"
    for path in (folder.results_path, folder.best_path):
        if path.exists():
            return f"{path.relative_to(folder.path)} has scores of checkpoints"
    # A run that was killed before its first checkpoint was complete has a log, too.
    logged = max((record["step"] for record in folder.metrics()), default=0)
    if folder.exists() and logged > 2 * folder.read_config().checkpoint.save_every_steps:
        return f"{folder.metrics_path.name} goes to step {logged}"
    return None


def _set_lost_run_aside(folder: RunFolder) -> AnyPath | None:
    """Moves what a run without checkpoints has left to `lost_run_N`; None if nothing has."""
    left = (folder.metrics_path, folder.eval, folder.saved_path)
    left += (folder.early_stop_path, folder.complete_path)
    found = [path for path in left if path.exists()]
    if not found:
        return None
    targets = (folder.path / f"lost_run_{number}" for number in itertools.count(1))
    target = next(path for path in targets if not path.exists())
    target.mkdir()
    for path in found:
        move(path, target / path.name)
    return target


def _set_misnamed_aside(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Moves away what Orbax may take for a checkpoint though no step is named like it."""
    for path in list(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else ():
        if path.name.isdecimal() and not is_step_name(path.name):
            say(f"{path}: not named as a checkpoint is; moved to {folder.damaged}")
            _set_aside(folder, path)


def _set_aside(folder: RunFolder, path: AnyPath) -> None:
    target = folder.damaged / path.name
    # In a bucket it may be the first part of this one, of a process that was killed.
    if not isinstance(target, BucketPath) and target.exists():
        remove_tree(target)
    target.parent.mkdir(exist_ok=True)
    move(path, target)
