"""Checkpoints: the only home of Orbax.

Orbax makes a checkpoint appear under its name only when it is whole. It does not notice a bit that
flips later, a file that goes missing, or a folder that it did not write. So every checkpoint has a
`manifest`, by which the newest intact one is restored. It is written after the checkpoint has been
opened and its arrays compared with those that were saved; only then are older checkpoints deleted,
so that one whole checkpoint exists at every instant.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp

from cascaded_diffusion.config.schema import CheckpointConfig, ema_name
from cascaded_diffusion.errors import UserError, is_out_of_memory
from cascaded_diffusion.files.bucket import AnyPath, BucketPath, for_orbax, is_of_storage
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.files.whole import remove_tree, sha256_of_arrays
from cascaded_diffusion.runtime import manifest
from cascaded_diffusion.runtime.mesh import broadcast_from_process_0, fail_on_all_processes
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params, Tree

_ITEM = "state"
# How tensorstore reports an error of the operating system, in the middle of a long line.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_MAX_REASON = 200
_MORE_LISTINGS = 4  # of a folder in a bucket, before it counts as missing
_Leaf = jax.Array | jax.ShapeDtypeStruct


def _reason(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    found = _OS_ERROR.search(text)
    return os.strerror(int(found[1])) if found else text[:_MAX_REASON]


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    # Before Orbax raises an error, several threads log it with its stack trace, and asyncio, which
    # nothing else here uses, logs others of the same cause.
    of_orbax = record.name == "asyncio" or "/orbax/" in record.pathname
    return not (of_orbax and record.levelno >= logging.ERROR)


def _is_key(leaf: _Leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(tree: Tree) -> Tree:
    """Replaces typed PRNG keys, or their shapes, by the integers they consist of."""

    def convert(leaf: _Leaf) -> _Leaf:
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.Array):
            return jax.random.key_data(leaf)
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(convert, tree)


# Shape and dtype of every array of a state, by name.
_Arrays = dict[str, tuple[tuple[int, ...], str]]


def _described(tree: object) -> _Arrays:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(x.shape), str(x.dtype))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_opens(folder: AnyPath, expected: _Arrays) -> None:
    """Raises OSError unless a checkpoint can be opened and has the arrays that were saved."""
    try:
        found = _described(ocp.PyTreeCheckpointHandler().metadata(for_orbax(folder / _ITEM)).tree)
    except Exception as e:
        raise OSError(f"what was written cannot be opened: {_reason(e)}") from e
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise OSError(
                f"what was written is not what was saved: {name} is {found.get(name)}, expected"
                f" {expected.get(name)}"
            )


class CheckpointWriter:
    """Saves and restores the trainer's state. One per run folder (see the lock).

    With small files, of `file_bytes` instead of Orbax's 2 GB, a save holds less in memory.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        *,
        say: Callable[[str], None] = print,
        file_bytes: int | None = None,
    ):
        self._folder, self._say, self._file_bytes = folder, say, file_bytes
        self._completer = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._completing: Future[None] | None = None
        self._max_to_keep = config.max_to_keep
        self._deleted = folder.path / ".deleted_checkpoints"
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_of_orbax)
        with self._as_user_error(0):
            self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        # Orbax deletes no older checkpoints: it would do so before the manifest is written.
        options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
        # It lists the folder while it deletes what a killed save has left there, and in a bucket a
        # folder is gone with its last object.
        more_tries = _MORE_LISTINGS if isinstance(self._folder.path, BucketPath) else 0
        path = for_orbax(self._folder.checkpoints)
        while True:
            try:
                return ocp.CheckpointManager(path, options=options, item_names=(_ITEM,))
            except FileNotFoundError:
                if more_tries == 0:
                    raise
            more_tries -= 1
            time.sleep(1.0)

    def save(self, step: int, state: object) -> None:
        """Starts to save; returns when the state is copied off the devices.

        Raises UserError if this save or an earlier one failed, or the run folder has disappeared.
        """
        # Perhaps only the first process failed, at the manifest.
        with fail_on_all_processes(), self._as_user_error(step):
            self._finish()
            if jax.process_index() == 0:
                self._folder.check_held()
        storable = _storable(state)
        tree = ocp.args.PyTreeSave(storable, ocdbt_target_data_file_size=self._file_bytes)
        args = ocp.args.Composite(**{_ITEM: tree})
        with self._as_user_error(step):
            saved = self._manager.save(step, args=args)
        if not saved:
            raise UserError(
                f"{self._folder.checkpoints}/{step}: could not be saved: a checkpoint of this step"
                " or a later one is there"
            )
        self._completing = self._completer.submit(self._complete, step, _described(storable))

    def is_complete(self) -> bool:
        """Whether nothing is being written any more; `wait` tells if that went well."""
        return self._completing is None or self._completing.done()

    def _complete(self, step: int, arrays: _Arrays) -> None:
        """In a thread: waits for Orbax's rename, and then adds the manifest."""
        try:
            self._manager.wait_until_finished()
        finally:
            if jax.process_index() == 0:
                self._check_not_moved(step)
        if jax.process_index() == 0:
            path = self._folder.checkpoints / str(step)
            _check_opens(path, arrays)
            manifest.write_manifest(path, step)
            write_json(self._folder.saved_path, {"step": step}, indent=None)
            self._delete_old(step)

    def _check_not_moved(self, step: int) -> None:
        try:
            self._folder.check_held()
        except UserError:
            if isinstance(self._folder.path, BucketPath):
                raise  # what is there is another process's
            # The run folder was moved, and Orbax has made it again with this checkpoint alone. It
            # is removed, so that the moved folder can be brought back.
            checkpoints = self._folder.checkpoints
            made = checkpoints.is_dir() and list(self._folder.path.iterdir()) == [checkpoints]
            if made and all(p.name.partition(".")[0] == str(step) for p in checkpoints.iterdir()):
                shutil.rmtree(self._folder.path, ignore_errors=True)
            raise

    def _delete_old(self, saved: int) -> None:
        finished = [step for step in manifest.finished_steps(self._folder) if step <= saved]
        kept = {self._folder.best_step(say=self._say), *finished[-self._max_to_keep :]}
        # Folders of later steps are copies made by others; a restart sets them aside.
        older = {step for step in self.steps() if step < saved} - kept
        with manifest.deletable(self._folder, older) as free:
            # After the pins: evaluation lets go of a checkpoint when it has chosen it as the best.
            for step in sorted(free - {self._folder.best_step(say=self._say)}):
                self._delete(self._folder.checkpoints / str(step))
        remove_tree(self._deleted)

    def _delete(self, path: AnyPath) -> None:
        """Readers lose a checkpoint in one instant; its files are deleted afterwards."""
        if isinstance(path, BucketPath):
            (path / manifest.MANIFEST).unlink(missing_ok=True)
            path.remove_tree()
        else:
            self._deleted.mkdir(exist_ok=True)
            os.replace(path, self._deleted / path.name)

    def write_apart(self, path: AnyPath, state: object) -> None:
        """Writes a state to a folder of its own, which is none of the checkpoints."""
        with self._as_user_error(0), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(for_orbax(path), args=ocp.args.PyTreeSave(_storable(state)), force=True)

    def _finish(self) -> None:
        if self._completing is not None:
            completing, self._completing = self._completing, None
            completing.result()

    @contextlib.contextmanager
    def _as_user_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            raise UserError(
                f"{self._folder.checkpoints}: saving a checkpoint failed at or before step {step}"
                f" ({_reason(e)}); the last good one is kept; make room and run the same command"
                " again"
            ) from e

    def wait(self, step: int) -> None:
        """Waits until the save of `step` is durable or raises UserError. Every process calls it."""
        with fail_on_all_processes(), self._as_user_error(step):
            self._finish()
            if jax.process_index() == 0:
                problem = manifest.damage(self._folder.checkpoints / str(step))
                if problem is not None:
                    raise OSError(problem)

    def close(self) -> None:
        """Ends all threads, including Orbax's. Raises nothing; `save` and `wait` do."""
        self._completer.shutdown()
        with contextlib.suppress(Exception):
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending. They need not be intact."""
        return manifest.steps_on_disk(self._folder)

    def newest_step(self, *, start_over: bool = False) -> int | None:
        """The step of the newest intact checkpoint, or None if the run is to begin at step 0.

        `manifest.newest_intact` says what `start_over` does. Raises UserError if no checkpoint is
        intact although there are or were some.
        """
        # The first process decides and sets aside, so that all restore the same checkpoint.
        found: int | None = None
        with fail_on_all_processes():
            if jax.process_index() == 0:
                remove_tree(self._deleted)
                manifest.forget_announcements(self._folder)
                found = manifest.newest_intact(self._folder, start_over=start_over, say=self._say)
        (step,) = broadcast_from_process_0([-1 if found is None else found])
        self._manager.reload()
        return None if step < 0 else step

    def restore(self, step: int, abstract_state: Tree) -> Tree:
        """The state of a checkpoint. Raises UserError if it is damaged, OSError if it may be whole.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` with the wanted shardings, which need
        not be those of the saved state.
        """
        args = ocp.args.Composite(**{_ITEM: _restore_args(abstract_state)})
        with _restoring(self._folder.checkpoints / str(step)):
            stored = self._manager.restore(step, args=args)[_ITEM]
        return _with_keys(stored, abstract_state)


# What the operating system says of a file that is not there, or is none.
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def _is_of_system(error: BaseException | None) -> bool:
    """Whether reading failed by something else than what was to be read, as too many open files."""
    while error is not None:
        codes = {int(code) for code in _OS_ERROR.findall(str(error))}
        if isinstance(error, OSError) and error.errno is not None:
            codes.add(error.errno)
        if codes:
            return codes.isdisjoint(_OF_THE_FILE)
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _restoring(path: AnyPath) -> Iterator[None]:
    """Raises UserError for a checkpoint that is damaged, OSError if it may well be whole."""
    try:
        yield
    except Exception as e:
        if isinstance(e, MemoryError) or is_out_of_memory(e):
            raise
        what = f"{path}: cannot be restored ({_reason(e)})"
        of_storage = is_of_storage(e) if isinstance(path, BucketPath) else _is_of_system(e)
        raise (OSError(what) if of_storage else UserError(what)) from e


def read_apart(path: AnyPath, abstract_state: Tree) -> Tree:
    """The state that `CheckpointWriter.write_apart` wrote. Raises like `CheckpointWriter.restore`.

    `abstract_state` is as for `CheckpointWriter.restore`.
    """
    with _restoring(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.restore(for_orbax(path), args=_restore_args(abstract_state))
    return _with_keys(stored, abstract_state)


def state_digest(folder: RunFolder, step: int) -> str:
    """SHA-256 of all arrays of a checkpoint: equal for states that are equal to the bit."""
    path = for_orbax(folder.checkpoints / str(step) / _ITEM)
    handler = ocp.PyTreeCheckpointHandler()
    args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
    )
    with ocp.Checkpointer(handler) as reader:
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    arrays = {
        jax.tree_util.keystr(place): np.asarray(x)
        for place, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return sha256_of_arrays(arrays)


def _with_keys(stored: Tree, abstract: Tree) -> Tree:
    """The inverse of `_storable`, of arrays."""
    return jax.tree.map(
        lambda x, like: jax.random.wrap_key_data(x) if _is_key(like) else x, stored, abstract
    )


def _restore_args(abstract: object, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    abstract = _storable(abstract)
    return ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )


def load_ema_params(folder: RunFolder, step: int, ema_decay: float, shapes: Params) -> Params:
    """The EMA parameters of a checkpoint. Raises UserError if it is not there or not intact."""
    name = ema_name(ema_decay)
    args = _restore_args({"ema_params": {name: shapes}}, partial=True)
    path = folder.checkpoints / str(step)
    problem = manifest.damage(path) if path.is_dir() else "it is not there"
    if problem is not None:
        raise UserError(f"{path}: not an intact checkpoint ({problem})")
    # The other processes of a job may read something else meanwhile.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    # It may be intact but of another stage, or a trainer deletes it meanwhile.
    with _restoring(path):
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore(for_orbax(path / _ITEM), args=args)
    params = restored["ema_params"][name]
    # A partial restore does not report what the checkpoint lacks.
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(params)):
        raise UserError(f"{path}: cannot be restored (it has no EMA of decay {ema_decay:g})")
    return params
