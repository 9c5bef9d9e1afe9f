"""From which checkpoint a run resumes, and what becomes of those that are damaged."""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
from collections.abc import Callable

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import manifest
from cascaded_diffusion.runtime.run_folder import RunFolder


def newest_intact(folder: RunFolder, *, start_over: bool, say: Callable[[str], None]) -> int | None:
    """The step to restore, or None to begin at step 0. Damaged newer checkpoints are set aside.

    Raises UserError if no checkpoint is intact, though there are some or the rest of the folder
    shows that there were: only the user may throw a run away. With `start_over` the run begins at
    step 0 all the same, and what the lost one has left is moved to `lost_run_N/`. `say` is told
    what was set aside and why.
    """
    _set_misnamed_aside(folder, say)
    steps = manifest.steps_on_disk(folder)
    problems: dict[int, str] = {}
    for step in reversed(steps):
        problem = manifest.damage(folder.checkpoints / str(step))
        if problem is None:
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
    if not intact and start_over:
        moved = _set_lost_run_aside(folder)
        if moved is not None:
            say(f"starting over at step 0; what the lost run has left is in {moved}")
    return step if intact else None


def _check_nothing_is_lost(folder: RunFolder, problems: dict[int, str]) -> None:
    """Raises UserError where beginning at step 0 would throw a run away."""
    damaged = {k: v for k, v in problems.items() if v != manifest.NEVER_COMPLETED}
    if damaged:
        newest = max(damaged)
        problem = (
            f"none of the checkpoints {sorted(problems)} is intact ({newest}: {damaged[newest]})"
        )
    elif (proof := _proof_of_steps(folder)) is not None:
        problem = f"no checkpoint is there that was completed, but {proof}"
    else:
        return
    raise UserError(
        f"{folder.checkpoints}: {problem}; restore the folder from a backup, choose another"
        " --workdir, or add --start_over to begin at step 0 here"
    )


def _proof_of_steps(folder: RunFolder) -> str | None:
    """What shows that a checkpoint was once completed here, in a few words, or None.

    A run that was killed before its first checkpoint was complete has a log, and no checkpoint
    to lose.
    """
    if folder.saved_path.exists():
        return f"{folder.saved_path.name} says that one was"
    if folder.complete_path.exists():
        return f"{folder.complete_path.name} says that the run has ended"
    for path in (folder.results_path, folder.best_path):
        if path.exists():
            return f"{path.relative_to(folder.path)} has scores of checkpoints"
    logged = max((record["step"] for record in folder.metrics()), default=0)
    if folder.exists() and logged > 2 * folder.read_config().checkpoint.save_every_steps:
        return f"{folder.metrics_path.name} goes to step {logged}"
    return None


def _set_lost_run_aside(folder: RunFolder) -> pathlib.Path | None:
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
        os.replace(path, target / path.name)
    return target


def _set_misnamed_aside(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Moves away what Orbax may take for a checkpoint though no step is named like it."""
    for path in list(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else ():
        if path.name.isdecimal() and not manifest.is_step_name(path.name):
            say(f"{path}: not named as a checkpoint is; moved to {folder.damaged}")
            _set_aside(folder, path)


def _set_aside(folder: RunFolder, path: pathlib.Path) -> None:
    target = folder.damaged / path.name
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)
