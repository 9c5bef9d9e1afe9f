"""The training loop of one stage: compile, restore, step, log, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage, check_precision
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.resume_checks import check_resume
from cascaded_diffusion.config.schema import RunConfig, ema_name
from cascaded_diffusion.errors import SingleProcessError, UserError
from cascaded_diffusion.files.json_files import read_json, write_json
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import monitor
from cascaded_diffusion.runtime.accelerators import accelerator_of
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.manifest import finished_steps
from cascaded_diffusion.runtime.metric_writer import MetricWriter, print_parameter_overview
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_data import RunData, check_run_data, write_run_data
from cascaded_diffusion.runtime.run_folder import CONFIG_REMEDY, RunFolder
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.training.clock import Clock
from cascaded_diffusion.training.grid import GridSampler, Records
from cascaded_diffusion.training.optimizer import build_learning_rate
from cascaded_diffusion.training.preemption import StopRequest
from cascaded_diffusion.training.state import TrainState

# start_step -> this process's batches from that step on.
DataFrom = Callable[[int], Iterator[Records]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended: "complete", "early_stop" or "preempted", and at which step."""

    reason: str
    step: int


def _restore_or_init(
    stage: Stage,
    config: RunConfig,
    mesh: Mesh,
    checkpoints: CheckpointWriter,
    *,
    start_over: bool,
) -> TrainState:
    abstract = step_lib.abstract_state(stage, config.train, mesh)
    restored = checkpoints.restore_latest(abstract, start_over=start_over)
    if restored is not None:
        return restored
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step_lib.make_init(stage, config.train), out_shardings=shardings)()


def _prepare_folder(folder: RunFolder, config: RunConfig, data: RunData | None) -> None:
    """Checks that a folder's run may go on so, and stores its config and its images' identity.

    Every process checks; the first one writes.
    """
    is_first_process = jax.process_index() == 0
    if folder.exists():
        old = folder.read_config()
        changed = check_resume(old, config, str(folder.path))
        stretched = _stretched_schedule(old, config, folder)
        for line in [*changed, *stretched] if is_first_process else ():
            print(f"changed since the run began: {line}", flush=True)
    elif folder.has_checkpoints() or folder.saved_path.exists():
        raise UserError(
            f"{folder.config_path}: missing, though a run was begun here; {CONFIG_REMEDY}"
        )
    if data is not None:
        check_run_data(folder, data)
    if is_first_process:
        folder.write_config(config)
        if data is not None:
            write_run_data(folder, data)


def _stretched_schedule(old: RunConfig, new: RunConfig, folder: RunFolder) -> list[str]:
    """What another train_steps does to a learning rate whose decay is over train_steps."""
    before, after = old.train, new.train
    if before.train_steps == after.train_steps or after.lr_decay == "none":
        return []
    step = max(finished_steps(folder), default=0)
    rates = [float(build_learning_rate(train)(step)) for train in (before, after)]
    return [
        f"the {after.lr_decay} decay of the learning rate is now over {after.train_steps} steps:"
        f" at step {step} the rate goes from {rates[0]:.3g} to {rates[1]:.3g}"
    ]


def _finished(folder: RunFolder, config: RunConfig, *, start_over: bool) -> Outcome | None:
    """The outcome of a run that has nothing left to do, which no model need be compiled for."""
    steps = finished_steps(folder)
    if folder.complete_path.exists():
        remedy = "remove it"
        record = read_json(folder.complete_path, remedy=remedy)
        known = isinstance(record, dict) and record.get("reason") in _REASONS
        if not known or not isinstance(record.get("step"), int):
            raise UserError(f"{folder.complete_path}: not what a trainer writes; {remedy}")
        reason, step = record["reason"], record["step"]
        stopped = reason == "early_stop" and folder.asked_to_stop(config.eval.patience_evals)
        if (stopped or step >= config.train.train_steps) and (steps or not start_over):
            if not steps:
                raise UserError(
                    f"{folder.complete_path}: says that step {step} was reached, but no checkpoint"
                    f" is in {folder.checkpoints}; restore it from a backup, choose another"
                    " --workdir, or add --start_over to begin at step 0 here"
                )
            return Outcome(reason=reason, step=step)
    if folder.asked_to_stop(config.eval.patience_evals) and (steps or not start_over):
        return Outcome(reason="early_stop", step=max(steps, default=0))
    return None


_REASONS = ("complete", "early_stop")


def _finished_for_all(folder: RunFolder, config: RunConfig, *, start_over: bool) -> Outcome | None:
    """The same as the first process sees it, in all."""
    outcome = None
    with mesh_lib.fail_on_all_processes():
        if jax.process_index() == 0:
            outcome = _finished(folder, config, start_over=start_over)
    told = (-1, 0)
    if outcome is not None:
        told = (_REASONS.index(outcome.reason), outcome.step)
    reason, step = mesh_lib.broadcast_from_process_0(told)
    return None if reason < 0 else Outcome(reason=_REASONS[reason], step=step)


def train(
    config: RunConfig,
    folder: RunFolder,
    data_from: DataFrom,
    *,
    image_shape: tuple[int, int, int],
    grid_examples: Records,
    low_res_shape: tuple[int, int, int] | None = None,
    data: RunData | None = None,
    start_over: bool = False,
    profile_steps: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
) -> Outcome:
    """Trains one stage to its end, going on from the newest checkpoint if there is one.

    Args:
      config: the run's config, checked.
      folder: where the run lives; made if it is not there.
      data_from: gives this process's batches from a step on.
      image_shape: (H, W, C) of the data.
      grid_examples: GRID_ROWS * GRID_COLUMNS real examples, whose low-res versions
        the sample grids of a super-resolution stage enlarge.
      low_res_shape: (h, w, C), where the data has low-res images stored.
      data: which images they are: a run goes on with the same only. None: nobody compares.
      start_over: begin at step 0 where a run is in the folder but none of its checkpoints is
        intact; without it that is refused.
      profile_steps: the first and last step to write a trace of, to RUN/profile.
      mesh: of all devices; by default what `config.mesh` says, with fsdp 1 where it says None.

    Raises:
      UserError: JAX computes with 64 bits, the folder belongs to another run, to other images or
        another process, checkpoints are damaged or cannot be written, or the loss is not finite.
    """
    check_precision()
    mesh = mesh_lib.build_mesh(config.mesh) if mesh is None else mesh
    is_first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with mesh_lib.fail_on_all_processes():
            if is_first_process:
                stack.enter_context(folder.writer_lock("train"))
        mesh_lib.check_shared(folder.path, "workdir")
        with mesh_lib.fail_on_all_processes():
            _prepare_folder(folder, config, data)
        outcome = _finished_for_all(folder, config, start_over=start_over)
        if outcome is not None:
            return outcome
        checkpoints = CheckpointWriter(folder, config.checkpoint)
        try:
            # From here on a signal is only noted: a step is taken, saved, and that is all.
            with StopRequest() as stop:
                outcome = _train(
                    config,
                    folder,
                    mesh,
                    data_from,
                    image_shape,
                    low_res_shape,
                    grid_examples,
                    checkpoints,
                    stop,
                    monitor.StepProfiler(folder.profile, profile_steps),
                    start_over=start_over,
                )
        finally:
            checkpoints.close()
        if outcome.reason != "preempted" and is_first_process:
            folder.check_held()
            write_json(folder.complete_path, dataclasses.asdict(outcome), indent=None)
        return outcome


def _train(
    config: RunConfig,
    folder: RunFolder,
    mesh: Mesh,
    data_from: DataFrom,
    image_shape: tuple[int, int, int],
    low_res_shape: tuple[int, int, int] | None,
    grid_examples: Records,
    checkpoints: CheckpointWriter,
    stop: StopRequest,
    profiler: monitor.StepProfiler,
    *,
    start_over: bool,
) -> Outcome:
    train_config, total = config.train, config.train.train_steps
    stage = build_stage(config.stage)

    state = _restore_or_init(stage, config, mesh, checkpoints, start_over=start_over)
    first_step = int(state.step)
    profiler.check(first_step + 1, total)
    if jax.process_index() == 0:
        # Of a shorter run that now goes on; those who follow it wait for the new end.
        folder.complete_path.unlink(missing_ok=True)
    is_first_process = jax.process_index() == 0
    if is_first_process:
        print_parameter_overview(state.params)
    start = time.monotonic()
    train_step = step_lib.compile_train_step(
        step_lib.make_train_step(stage, train_config, mesh),
        state,
        image_shape,
        train_config.batch_size,
        mesh,
        low_res_shape=low_res_shape,
    )
    compile_secs = time.monotonic() - start
    flops_per_step = step_lib.flops_per_step(stage, train_config.batch_size)
    accelerator = accelerator_of(jax.devices()[0].device_kind)
    say = partial(_say, config.stage.name)
    say(
        f"train step compiled in {compile_secs:.1f} s, {flops_per_step / 1e9:.1f} model GFLOP"
        f" (multiply-add = 2, backward = 2 x forward) for {train_config.batch_size} images, on"
        f" {_mesh_name(mesh)}; state {_state_gb(state):.2g} GB per device"
    )
    if first_step:
        say(f"resuming from step {first_step}")

    writer = MetricWriter(folder, resume_step=first_step) if is_first_process else None
    sample_grid = GridSampler(step_lib.stage_for_sampling(stage, mesh), config, mesh, grid_examples)
    local_batches = data_from(first_step)
    batches = mesh_lib.DeviceBatches(local_batches, mesh)
    progress = Progress(
        total,
        unit="steps",
        label=config.stage.name,
        initial=first_step,
        silent=not is_first_process,
    )
    clock = Clock(
        train_config.batch_size,
        flops_per_step,
        peak_flops=None if accelerator is None else mesh.size * accelerator.peak_flops,
        say=progress.say,
    )
    compiles = monitor.CompileWatch()
    reason, step, saved_step = "complete", first_step, first_step
    pending: step_lib.Metrics | None = None

    def read_metrics(at_step: int, metrics: step_lib.Metrics) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(values, at_step, checkpoints)
        if at_step == first_step + 1 and (secs := monitor.secs_since_start()) is not None:
            progress.say(f"{config.stage.name}: first step done {secs:.1f} s after the start")
        clock.step_done(at_step)
        if at_step % train_config.log_every_steps == 0 or at_step == total:
            speed = {**clock.read(), **monitor.peak_memory()}
            skipped = getattr(local_batches, "num_skipped", 0)
            if writer is not None:
                counted = {"compile_secs": compile_secs, "data_skipped_records": skipped}
                with _alone():
                    writer.write_scalars(at_step, {**values, **speed, **counted})
            details = {"skipped_records": str(skipped)} if skipped else {}
            if "model_flops_utilization" in speed:
                details["mfu"] = f"{100 * speed['model_flops_utilization']:.0f} %"
            progress.update(
                at_step,
                loss=f"{values['loss']:.4f}",
                images_per_sec=f"{speed['images_per_sec']:.0f}",
                data_wait=f"{100 * speed['data_wait_fraction']:.0f} %",
                **details,
            )

    with (
        contextlib.closing(progress),
        contextlib.closing(batches),
        contextlib.closing(profiler),
        compiles,
    ):
        while step < total:
            if _asked_to_stop(folder, config, step):
                reason = "early_stop"
                break
            waited = time.monotonic()
            with _alone():
                records = next(batches)
            clock.data_waited(time.monotonic() - waited)
            profiler.before(step + 1)
            state, metrics = train_step(state, records)
            traced = profiler.after(step + 1, metrics)
            if traced is not None and is_first_process:
                progress.say(traced)
            # One step late: the devices have this step to work on while the host
            # reads the numbers of the last.
            if pending is not None:
                read_metrics(step, pending)
            step, pending = step + 1, metrics

            stopping = stop.seen(step)
            save = step % config.checkpoint.save_every_steps == 0 or step == total or stopping
            sample = step % train_config.sample_every_steps == 0 or step == total
            if save or sample:
                # Before anything is kept of this step, it is known to be finite.
                read_metrics(step, pending)
                pending = None
                with clock.pause():
                    if save:
                        checkpoints.save(step, state)
                        saved_step = step
                    if sample:
                        grid = sample_grid(state.ema_params[ema_name(config.eval.ema_decays[0])])
                        if writer is not None:
                            with _alone():
                                writer.write_image(step, "ema_samples", grid)
                # What these compile, they compile once.
                compiles.take()
            elif step > first_step + _FIRST_STEPS:
                count, secs = compiles.take()
                if secs > _NOTED_COMPILE_SECS:
                    progress.say(
                        f"recompilation: {count} program(s) in {secs:.1f} s at step {step}; the"
                        " step itself is compiled but once"
                    )
            if stopping and step < total:
                reason = "preempted"
                break
        if pending is not None:
            read_metrics(step, pending)
        if step > saved_step:
            checkpoints.save(step, state)
        if step > first_step:
            checkpoints.wait(step)
    if writer is not None:
        writer.close()
    return Outcome(reason=reason, step=step)


# Until this many steps are done, and of fewer seconds than that, a compilation is no news.
_FIRST_STEPS, _NOTED_COMPILE_SECS = 3, 1.0


def _say(name: str, line: str) -> None:
    """Prints a line, by one of all processes."""
    if jax.process_index() == 0:
        print(f"{name}: {line}", flush=True)


def _mesh_name(mesh: Mesh) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = jax.devices()[0].device_kind
    return f"{mesh.size} {kind} device(s){' (' + sizes + ')' if sizes else ''}{processes}"


def _state_gb(state: TrainState) -> float:
    """Of one device."""
    return sum(x.addressable_shards[0].data.nbytes for x in _arrays(state)) / 1e9


def _arrays(state: TrainState) -> list[jax.Array]:
    """Its arrays but for the key, which is none that has bytes."""
    return jax.tree.leaves(dataclasses.replace(state, key=None))


def _asked_to_stop(folder: RunFolder, config: RunConfig, step: int) -> bool:
    """Whether evaluation asks to stop: the same answer for all processes.

    With several, the first one looks and tells the others, at steps that are logged: a file
    may appear to one of them earlier than to another.
    """
    if jax.process_count() == 1:
        return folder.asked_to_stop(config.eval.patience_evals)
    if step % config.train.log_every_steps:
        return False
    asked = jax.process_index() == 0 and folder.asked_to_stop(config.eval.patience_evals)
    return bool(mesh_lib.broadcast_from_process_0([int(asked)])[0])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """What fails here fails in one process: the others are in the middle of a step."""
    try:
        yield
    except (UserError, OSError) as e:
        if jax.process_count() == 1:
            raise
        raise SingleProcessError(str(e)) from e


def _check_finite(values: dict[str, float], step: int, checkpoints: CheckpointWriter) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        kept = checkpoints.steps()
        raise UserError(
            f"{bad[0]} is {values[bad[0]]} at step {step}: training has diverged; nothing of this"
            f" step was saved (last checkpoint: {kept[-1] if kept else 'none'}); lower"
            " config.train.learning_rate or config.train.grad_clip_norm"
        )
