"""The training loop of one stage: compile, restore, step, log, save, stop."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage, check_precision
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import monitor
from cascaded_diffusion.runtime.accelerators import accelerator_of
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.metric_writer import print_parameter_overview
from cascaded_diffusion.runtime.run_data import RunData
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.runtime.signals import START_SIGNALS, ignore
from cascaded_diffusion.training import resume
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.training.hang import HangWatch
from cascaded_diffusion.training.recorder import GridSampler, Recorder, Records
from cascaded_diffusion.training.resume import Outcome

Shape = tuple[int, int, int]


def train(
    config: RunConfig,
    folder: RunFolder,
    data_from: Callable[[int], Iterator[Records]],
    *,
    image_shape: Shape,
    grid_examples: Records,
    low_res_shape: Shape | None = None,
    data: RunData | None = None,
    start_over: bool = False,
    allow_changed: Collection[str] = (),
    profile_steps: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
) -> Outcome:
    """Trains one stage to its end, resuming from the newest checkpoint if there is one.

    `data_from` gives this process's batches from a step on; their images are (H, W, C) as
    `image_shape`, and (h, w, C) as `low_res_shape` where low-res ones are stored. `grid_examples`
    are GRID_ROWS * GRID_COLUMNS real examples for `GridSampler`. A run resumes only with the same
    `data`; None is not compared. A run without an intact checkpoint is refused unless it is to
    `start_over` at step 0. `allow_changed` are keys that may change what is trained from here on,
    see `resume_checks.check_resume`. The first to the last of `profile_steps` are traced to
    RUN/profile. The default `mesh` is what `config.mesh` says, with fsdp 1 where it says None.

    Raises UserError if JAX computes with 64 bits, the folder belongs to another run, to other
    images or another process, checkpoints are damaged or cannot be written, or the loss is not
    finite.
    """
    check_precision()
    mesh = mesh_lib.build_mesh(config.mesh) if mesh is None else mesh
    total, is_first_process = config.train.train_steps, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with mesh_lib.fail_on_all_processes():
            if is_first_process:
                stack.enter_context(folder.writer_lock("train"))
        mesh_lib.check_shared(folder.path, "workdir")
        with mesh_lib.fail_on_all_processes():
            changed = resume.check_folder(folder, config, data, allow_changed)
        outcome = resume.finished(folder, config, start_over=start_over)
        if outcome is not None:
            resume.store(folder, config, data, changed)
            if is_first_process and outcome.step and not folder.complete_path.exists():
                _write_complete(folder, outcome)  # asked to stop while no trainer was running
            return outcome
        checkpoints = CheckpointWriter(folder, config.checkpoint)
        stack.enter_context(contextlib.closing(checkpoints))
        stage = build_stage(config.stage)
        abstract = step_lib.abstract_state(stage, config.train, mesh)
        # What is refused is refused before anything is compiled.
        newest = checkpoints.newest_step(start_over=start_over)
        profiler = monitor.StepProfiler(folder.profile, profile_steps)
        profiler.check((newest or 0) + 1, total)
        if is_first_process:
            # Whoever waits for a shorter run that now resumes, waits for the new end.
            folder.complete_path.unlink(missing_ok=True)
        compiling = _start_compiling(stage, config, mesh, abstract, image_shape, low_res_shape)
        if newest is not None:
            state = checkpoints.restore(newest, abstract)
        else:
            state = step_lib.init_state(stage, config.train, mesh)
        # A run that is refused keeps the config that it has.
        resume.store(folder, config, data, changed, mesh)
        step = int(state.step)
        if is_first_process:
            folder.forget_imported()
            print_parameter_overview(state.params)
        local_batches = data_from(step)
        batches = mesh_lib.DeviceBatches(local_batches, mesh)
        stack.enter_context(contextlib.closing(batches))
        flops = step_lib.flops_per_step(stage, config.train.batch_size)
        train_step, compile_secs = compiling.result()
        if is_first_process:
            _print_start(config, mesh, state, flops, compile_secs)
        make_grid = None
        if config.train.sample_every_steps is not None:
            sampled = step_lib.stage_for_sampling(stage, mesh)
            make_grid = GridSampler(sampled, config, mesh, grid_examples)
        recorder = Recorder(
            config, folder, mesh, checkpoints, make_grid, local_batches, step, flops, compile_secs
        )
        # From here on a signal is only noted: the step is finished and saved first.
        asked_to_stop = stack.enter_context(_stop_requests())
        reason = "complete"
        hang_watch = HangWatch(config.train.hang_secs)
        with hang_watch, recorder, contextlib.closing(profiler):
            while step < total:
                if _evaluation_asks_to_stop(folder, config, step):
                    reason = "early_stop"
                    break
                records = recorder.next_of(batches)
                step += 1
                profiler.before(step)
                state, metrics = train_step(state, records)
                if (traced := profiler.after(step, metrics)) is not None:
                    recorder.say(traced)
                recorder.add(step, state, metrics)
                hang_watch.begin(f"saving and sampling after step {step}")
                stopping = asked_to_stop(step)
                recorder.keep(step, state, stopping=stopping)
                hang_watch.begin(f"the steps from {step} on")  # they are waited for one late
                if stopping and step < total:
                    reason = "preempted"
                    break
            hang_watch.begin("the last save")
            recorder.finish(step, state)
        outcome = Outcome(reason=reason, step=step)
        if reason != "preempted" and is_first_process:
            _write_complete(folder, outcome)
        return outcome


def _write_complete(folder: RunFolder, outcome: Outcome) -> None:
    folder.check_held()
    write_json(folder.complete_path, dataclasses.asdict(outcome), indent=None)


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Notes SIGTERM and SIGINT. Yields `asked(step)`: whether to stop at the end of that step.

    Several processes must all stop at the same step, so there JAX's preemption notice, which every
    process calls at every step, is asked instead: a signal to one process stops all.
    """
    noted: list[int] = []
    if jax.process_count() > 1:
        # JAX notices SIGTERM only.
        handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
    else:
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda n, _: noted.append(n))

    def asked(step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(noted)

    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    START_SIGNALS.end()
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is ignore else handler)


def _start_compiling(
    stage: Stage,
    config: RunConfig,
    mesh: Mesh,
    abstract: step_lib.TrainState,
    image_shape: Shape,
    low_res_shape: Shape | None,
) -> Future[tuple[jax.stages.Compiled, float]]:
    """Compiles the training step in a thread, while the state is restored and images are read.

    The result is the step, and the seconds that it took.
    """

    def compiled() -> tuple[jax.stages.Compiled, float]:
        start = time.monotonic()
        train_step = step_lib.compile_train_step(
            stage, config.train, mesh, abstract, image_shape, low_res_shape=low_res_shape
        )
        return train_step, time.monotonic() - start

    if jax.process_index() == 0:
        print(f"{config.stage.name}: compiling the training step ...", flush=True)
    compiler = ThreadPoolExecutor(1, thread_name_prefix="compilation")
    future = compiler.submit(compiled)
    compiler.shutdown(wait=False)
    return future


def _print_start(
    config: RunConfig, mesh: Mesh, state: step_lib.TrainState, flops: float, compile_secs: float
) -> None:
    name, kind = config.stage.name, jax.devices()[0].device_kind
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    arrays = jax.tree.leaves(dataclasses.replace(state, key=None))  # a key has no bytes
    device_bytes = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    print(
        f"{name}: train step compiled in {compile_secs:.1f} s, {flops / 1e9:.1f} model"
        f" GFLOP (multiply-add = 2, backward = 2 x forward) for {config.train.batch_size} images,"
        f" on {mesh.size} {kind} device(s){f' ({sizes})' if sizes else ''}{processes};"
        f" state {device_bytes / 1e9:.2g} GB per device",
        flush=True,
    )
    if accelerator_of(kind) is None and jax.default_backend() != "cpu":
        print(f"{name}: {kind!r} is not in the table of peaks, so MFU is left out", flush=True)
    if step := int(state.step):
        print(f"{name}: resuming from step {step}", flush=True)


def _evaluation_asks_to_stop(folder: RunFolder, config: RunConfig, step: int) -> bool:
    # A file may appear to one process earlier than to another, so process 0 tells the others, at
    # steps that are logged.
    if jax.process_count() > 1 and step % config.train.log_every_steps:
        return False
    asked = jax.process_index() == 0 and folder.asked_to_stop(config.eval.patience_evals)
    return bool(mesh_lib.broadcast_from_process_0([int(asked)])[0])
