"""Checkpoints: the only home of Orbax.

Orbax makes a checkpoint appear under its name only when it is whole. It does not
notice a bit that flips later, a file that goes missing, or a folder that is not
one of its own. So every checkpoint carries a manifest with the SHA-256 of each of
its files, written when the checkpoint is complete. Restoring checks it and falls
back to the newest checkpoint that is intact, saying which it passed over and why.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from cascaded_diffusion.config import CheckpointConfig, ema_name
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.mesh import together, told_by_first
from cascaded_diffusion.runtime.run_folder import RunFolder, write_whole

MANIFEST = "manifest.json"
_NEVER_COMPLETED = f"{MANIFEST} is missing: it was never completed"
_ITEM = "state"


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(tree: Any) -> Any:
    """Typed PRNG keys as the integers they are made of; the rest as it is."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _abstract_storable(abstract: Any) -> Any:
    def convert(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_key(leaf):
            return leaf
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(convert, abstract)


def _from_storable(stored: Any, abstract: Any) -> Any:
    return jax.tree.map(
        lambda x, like: jax.random.wrap_key_data(x) if _is_key(like) else x, stored, abstract
    )


def _file_hashes(folder: pathlib.Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            hashes[path.relative_to(folder).as_posix()] = digest
    return hashes


def write_manifest(folder: pathlib.Path) -> None:
    """Records the SHA-256 of every file of a finished checkpoint."""
    write_whole(folder / MANIFEST, json.dumps({"sha256": _file_hashes(folder)}).encode())


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words, or None."""
    path = folder / MANIFEST
    if not path.exists():
        return _NEVER_COMPLETED
    try:
        expected = json.loads(path.read_text())["sha256"]
    except (ValueError, KeyError, TypeError, OSError):
        return f"{MANIFEST} cannot be read"
    found = _file_hashes(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        if expected[name] != found[name]:
            return f"{name} has changed since it was written"
    return None


class _KeepLatestAndBest:
    """Orbax preservation policy: the last n, and those that evaluation chose or is reading."""

    def __init__(self, folder: RunFolder, max_to_keep: int):
        self._folder = folder
        self._max_to_keep = max_to_keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        best = self._folder.best()
        kept = {None if best is None else best["step"], self._folder.read_step()}
        newest = len(checkpoints) - self._max_to_keep
        return [i >= newest or c.step in kept for i, c in enumerate(checkpoints)]


def _steps_on_disk(checkpoints: pathlib.Path) -> list[int]:
    if not checkpoints.is_dir():
        return []
    return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())


class CheckpointWriter:
    """Saves and restores the trainer's state. One per run folder (see the lock)."""

    def __init__(
        self, folder: RunFolder, config: CheckpointConfig, *, say: Callable[[str], None] = print
    ):
        self._folder = folder
        self._say = say
        self._finisher: threading.Thread | None = None
        self._error: Exception | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepLatestAndBest(folder, config.max_to_keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            folder.checkpoints.absolute(), options=options, item_names=(_ITEM,)
        )

    def save(self, step: int, state: Any) -> None:
        """Starts to save; returns when the state is copied off the devices.

        Raises:
          UserError: this save, or an earlier one that ran in the background, failed.
        """
        with together():  # the first process's manifest alone may have failed
            self._finish(step)
        try:
            saved = self._manager.save(
                step, args=ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(_storable(state))})
            )
        except Exception as e:
            raise self._save_error(step, e) from e
        if not saved:
            raise UserError(f"{self._folder.checkpoints}/{step}: could not be saved, it exists")
        self._finisher = threading.Thread(target=self._complete, args=(step,), name="manifest")
        self._finisher.start()

    def _complete(self, step: int) -> None:
        # In a thread of its own: waits for Orbax's rename, then adds the manifest.
        # An error is kept for the trainer: a thread has nobody to tell.
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self._folder.checkpoints / str(step))
        except Exception as e:
            self._error = e

    def _finish(self, step: int) -> None:
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            raise self._save_error(step, self._error) from self._error

    def _save_error(self, step: int, error: BaseException) -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(
            f"{self._folder.checkpoints}: saving a checkpoint failed at or before step {step}"
            f" ({reason}); the last good one is kept, make room and run the same command again"
        )

    def wait(self, step: int) -> None:
        """Waits until the save of `step` is durable. Raises UserError if it is not.

        To be called by every process; the first one, which writes the manifest, looks.
        """
        with together():
            self._finish(step)
            if jax.process_index() == 0:
                problem = damage(self._folder.checkpoints / str(step))
                if problem is not None:
                    raise self._save_error(step, OSError(problem))

    def close(self) -> None:
        """Ends the threads, Orbax's too."""
        if self._finisher is not None:
            self._finisher.join()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending. They need not be intact."""
        return _steps_on_disk(self._folder.checkpoints)

    def restore_latest(self, abstract_state: Any) -> Any | None:
        """The newest intact state, or None where nothing was ever saved.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with the shardings wanted,
            which need not be those that the state was saved with.

        Damaged newer checkpoints are moved to `checkpoints_damaged/`.

        Raises:
          UserError: there are checkpoints, but none is intact. Starting again at
            step 0 would throw the run away, so that is left to the user.
        """
        # Of several processes the first looks, and clears away: all must restore the same.
        step: int | None = None
        with together():
            if jax.process_index() == 0:
                step = self._newest_intact()
        (told,) = told_by_first([-1 if step is None else step])
        step = None if told < 0 else told
        if jax.process_index() > 0:
            self._manager.reload()
        if step is None:
            return None
        stored = self._manager.restore(
            step, args=ocp.args.Composite(**{_ITEM: _restore_args(abstract_state)})
        )[_ITEM]
        return _from_storable(stored, abstract_state)

    def _newest_intact(self) -> int | None:
        """The step to restore; what is newer and damaged is set aside."""
        steps = self.steps()
        problems: dict[int, str] = {}
        for step in reversed(steps):
            problem = damage(self._folder.checkpoints / str(step))
            if problem is None:
                break
            problems[step] = problem
        else:
            only_unfinished = len(steps) == 1 and problems[steps[0]] == _NEVER_COMPLETED
            if steps and not only_unfinished:
                raise UserError(
                    f"{self._folder.checkpoints}: none of the checkpoints {steps} is intact"
                    f" ({steps[-1]}: {problems[steps[-1]]}); restore the folder from a backup, or"
                    " choose another --workdir to start again"
                )
        intact = len(problems) < len(steps)
        for bad, problem in problems.items():
            # With none intact, the very first save was cut off: nothing was kept yet.
            remedy = "falling back to the one before" if intact else "starting at step 0"
            self._say(f"checkpoint {bad} is damaged ({problem}); {remedy}")
            self._set_aside(self._folder.checkpoints / str(bad))
        return step if intact else None

    def _damaged_folder(self) -> pathlib.Path:
        return self._folder.path / "checkpoints_damaged"

    def _set_aside(self, path: pathlib.Path) -> None:
        target = self._damaged_folder() / path.name
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        self._manager.reload()


def _restore_args(abstract: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    abstract = _abstract_storable(abstract)
    return ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )


def manifest_of(folder: RunFolder, step: int) -> bytes:
    """The manifest of a checkpoint: the checksums of all that it holds."""
    return (folder.checkpoints / str(step) / MANIFEST).read_bytes()


def finished_steps(folder: RunFolder) -> list[int]:
    """Steps with a complete checkpoint, ascending. For readers beside a live trainer."""
    return [
        step
        for step in _steps_on_disk(folder.checkpoints)
        if (folder.checkpoints / str(step) / MANIFEST).exists()
    ]


def load_ema_params(folder: RunFolder, step: int, ema_decay: float, abstract_params: Any) -> Any:
    """The EMA parameters of one checkpoint and decay, for evaluation and sampling.

    Raises:
      UserError: the checkpoint is not there or not intact.
    """
    name = ema_name(ema_decay)
    path = folder.checkpoints / str(step)
    problem = damage(path) if path.is_dir() else "it is not there"
    if problem is not None:
        raise UserError(f"{path}: not an intact checkpoint ({problem})")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                (path / _ITEM).absolute(),
                args=_restore_args({"ema_params": {name: abstract_params}}, partial=True),
            )
    except Exception as e:
        # Intact, yet not what this stage has; or a trainer removed it meanwhile.
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be restored ({reason})") from e
    params = restored["ema_params"][name]
    # What a checkpoint lacks, a partial restore passes over in silence.
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        raise UserError(f"{path}: cannot be restored (it has no EMA of decay {ema_decay:g})")
    return params
