"""Whether and how a run folder's training resumes."""

import dataclasses
from collections.abc import Collection, Sequence

import jax
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.resume_checks import check_resume
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_record
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.environment import store_environment
from cascaded_diffusion.runtime.manifest import damage, finished_steps
from cascaded_diffusion.runtime.run_data import RunData, check_run_data, write_run_data
from cascaded_diffusion.runtime.run_folder import CONFIG_REMEDY, RunFolder
from cascaded_diffusion.training.step import build_learning_rate, state_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended: "complete", "early_stop" or "preempted", and at which step."""

    reason: str
    step: int


# What TRAIN_COMPLETE may say.
_REASONS = ("complete", "early_stop")


def check_folder(
    folder: RunFolder, config: RunConfig, data: RunData | None, allowed: Collection[str] = ()
) -> list[str]:
    """Lists what has changed since the run began, with which it may resume.

    Raises UserError if the config or the images would change what is computed, but for keys that
    are `allowed` to; if these change what parameters there are; or if the config of a run that was
    begun is missing.
    """
    changed = []
    if folder.exists():
        old = folder.read_config()
        changed = check_resume(old, config, str(folder.path), allowed=allowed)
        if allowed:
            _check_same_parameters(old, config)
        changed += _stretched_schedule(old, config, folder)
    elif folder.has_checkpoints() or folder.saved_path.exists():
        path = folder.config_path
        raise UserError(f"{path}: missing, though a run was begun here; {CONFIG_REMEDY}")
    if data is not None:
        check_run_data(folder, data)
    return changed


def store(
    folder: RunFolder,
    config: RunConfig,
    data: RunData | None,
    changed: Sequence[str],
    mesh: Mesh | None = None,
) -> None:
    """Stores the config and the images' record, and prints what changed. Every process calls it.

    With a `mesh`, on which the run goes on, the environment is stored and compared, too.
    """
    with mesh_lib.fail_on_all_processes():
        if jax.process_index() == 0:
            for line in changed:
                print(f"changed since the run began: {line}", flush=True)
            for line in [] if mesh is None else store_environment(folder, mesh):
                print(f"changed since the run was last started: {line}", flush=True)
            folder.write_config(config)
            if data is not None:
                write_run_data(folder, data)


def _check_same_parameters(old: RunConfig, new: RunConfig) -> None:
    before, after = (
        {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(s)}
        for s in (state_shapes(build_stage(c.stage), c.train) for c in (old, new))
    )
    differ = sorted(k for k in {**before, **after} if before.get(k) != after.get(k))
    if differ:
        raise UserError(
            f"--allow_changed: what changed needs other parameters than the run has: {differ[0]}"
            f" was {before.get(differ[0])} and would be {after.get(differ[0])}; choose another"
            " --workdir"
        )


def _stretched_schedule(old: RunConfig, new: RunConfig, folder: RunFolder) -> list[str]:
    """A line on what another train_steps does to a learning rate that decays over train_steps."""
    before, after = old.train, new.train
    if before.train_steps == after.train_steps or after.lr_decay == "none":
        return []
    step = max(finished_steps(folder), default=0)
    rates = [float(build_learning_rate(train)(step)) for train in (before, after)]
    return [
        f"the {after.lr_decay} decay of the learning rate is now over {after.train_steps} steps:"
        f" at step {step} the rate goes from {rates[0]:.3g} to {rates[1]:.3g}"
    ]


def finished(folder: RunFolder, config: RunConfig, *, start_over: bool) -> Outcome | None:
    """The outcome of a run that has nothing left to do, or None: as process 0 sees it, in all.

    It is known before anything is compiled. A run whose last checkpoint is lost or damaged is not
    finished. Raises UserError if TRAIN_COMPLETE is damaged, or there are no checkpoints beside it.
    """
    values = (-1, 0)  # the reason's index or, if there is something left to do, -1; and the step
    with mesh_lib.fail_on_all_processes():
        if jax.process_index() == 0:
            values = _finished(folder, config, start_over=start_over)
    reason, step = mesh_lib.broadcast_from_process_0(values)
    return None if reason < 0 else Outcome(reason=_REASONS[reason], step=step)


def _finished(folder: RunFolder, config: RunConfig, *, start_over: bool) -> tuple[int, int]:
    def is_whole(step: int) -> bool:
        # If not, the trainer falls back to an older one, or says why it cannot.
        return damage(folder.checkpoints / str(step)) is None

    steps = finished_steps(folder)
    asked_to_stop = folder.asked_to_stop(config.eval.patience_evals)
    if folder.complete_path.exists():
        what, types = "not what a trainer writes", {"reason": str, "step": int}
        record = read_record(folder.complete_path, types, otherwise=what)
        reason, step = record["reason"], record["step"]
        if reason not in _REASONS:
            raise UserError(f"{folder.complete_path}: {what}; remove it")
        stopped = reason == "early_stop" and asked_to_stop
        if (stopped or step >= config.train.train_steps) and (steps or not start_over):
            if not steps:
                raise UserError(
                    f"{folder.complete_path}: says that step {step} was reached, but no checkpoint"
                    f" is in {folder.checkpoints}; restore it from a backup, choose another"
                    " --workdir, or add --start_over to begin at step 0 here"
                )
            return (_REASONS.index(reason), step) if is_whole(step) else (-1, 0)
    if asked_to_stop and (steps or not start_over):
        step = max(steps, default=0)
        if not steps or is_whole(step):
            return _REASONS.index("early_stop"), step
    return -1, 0
