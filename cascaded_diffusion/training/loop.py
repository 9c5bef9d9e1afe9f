"""The training loop of one stage: compile, restore, step, log, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config import RunConfig, ema_name
from cascaded_diffusion.config_checks import check_resume
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.logging import MetricWriter, Progress, print_parameter_overview
from cascaded_diffusion.runtime.run_folder import RunFolder, write_whole
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.training.state import TrainState

Records = dict[str, np.ndarray]
# start_step -> this process's batches from that step on.
DataFrom = Callable[[int], Iterator[Records]]

# Size of a sample grid.
GRID_ROWS, GRID_COLUMNS = 4, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended: "complete", "early_stop" or "preempted", and at which step."""

    reason: str
    step: int


class _StopRequest:
    """Notes SIGTERM and SIGINT, for the loop to stop at the end of a step.

    Under `jax.distributed` all processes must stop at the same step, so there
    JAX's own notice is asked instead.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._distributed = jax.process_count() > 1

    def __enter__(self) -> _StopRequest:
        if not self._distributed:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self._signal = number

    def seen(self, step: int) -> bool:
        if self._distributed:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None


class _GridSampler:
    """Grids of EMA samples for TensorBoard, always of the same noise and labels."""

    def __init__(self, stage: Stage, config: RunConfig, mesh: Mesh, examples: Records):
        num_classes = stage.config.num_classes
        self._key = jax.random.key(config.eval.seed)
        self._indices = np.arange(len(examples["label"]))
        self._labels = self._indices % num_classes if num_classes else None
        self._low_res, level = None, None
        if stage.augment is not None:
            self._low_res = np.asarray(stage.low_res_from(float_from_uint8(examples["image"])))
            self._labels = examples["label"] if num_classes else None
            level = config.eval.aug_level if stage.augment.has_level else None

        def sample(params: Any, key: jax.Array, indices: Any, labels: Any, low_res: Any) -> Any:
            image = stage.sample(
                mesh_lib.gathered(params, mesh),
                keys_for(key, indices),
                label=labels,
                low_res=low_res,
                aug_level=level,
            )
            return uint8_from_float(image)

        self._sample = jax.jit(sample, out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, params: Any) -> np.ndarray:
        images = self._sample(params, self._key, self._indices, self._labels, self._low_res)
        return pictures.grid(np.asarray(images), columns=GRID_COLUMNS)


def _restore_or_init(
    stage: Stage, config: RunConfig, mesh: Mesh, checkpoints: CheckpointWriter
) -> TrainState:
    abstract = step_lib.abstract_state(stage, config.train, mesh)
    restored = checkpoints.restore_latest(abstract)
    if restored is not None:
        return restored
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step_lib.make_init(stage, config.train), out_shardings=shardings)()


def _prepare_folder(folder: RunFolder, config: RunConfig, data: Mapping[str, str]) -> None:
    if folder.exists():
        for line in check_resume(folder.read_config(), config, str(folder.path)):
            print(f"changed since the run began: {line}", flush=True)
    folder.check_data(data)
    if jax.process_index() == 0:
        folder.write_config(config)
        folder.write_data(data)


def _finished(folder: RunFolder, config: RunConfig) -> Outcome | None:
    """The outcome of a run that has nothing left to do."""
    if folder.complete_path.exists():
        try:
            record = json.loads(folder.complete_path.read_text())
            reason, step = record["reason"], int(record["step"])
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder.complete_path}: not what a trainer writes; remove it") from e
        stopped = reason == "early_stop" and folder.asked_to_stop(config.eval.patience_evals)
        if stopped or step >= config.train.train_steps:
            return Outcome(reason=reason, step=step)
    return None


def train(
    config: RunConfig,
    folder: RunFolder,
    data_from: DataFrom,
    *,
    image_shape: tuple[int, int, int],
    grid_examples: Records,
    low_res_shape: tuple[int, int, int] | None = None,
    data_identity: Mapping[str, str] | None = None,
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
      data_identity: which images they are, by split: a run goes on with the same only.

    Raises:
      UserError: the folder belongs to another run, to other images or another process, checkpoints
        are damaged or cannot be written, or the loss is not finite.
    """
    is_first_process = jax.process_index() == 0
    with folder.writer_lock("train") if is_first_process else contextlib.nullcontext():
        _prepare_folder(folder, config, data_identity or {})
        outcome = _finished(folder, config)
        if outcome is not None:
            return outcome
        if is_first_process:
            # Of a shorter run that now goes on; those who follow it wait for the new end.
            folder.complete_path.unlink(missing_ok=True)
        checkpoints = CheckpointWriter(folder, config.checkpoint)
        try:
            # From here on a signal is only noted: a step is taken, saved, and that is all.
            with _StopRequest() as stop:
                outcome = _train(
                    config,
                    folder,
                    data_from,
                    image_shape,
                    low_res_shape,
                    grid_examples,
                    checkpoints,
                    stop,
                )
        finally:
            checkpoints.close()
        if outcome.reason != "preempted" and is_first_process:
            write_whole(
                folder.complete_path, json.dumps(dataclasses.asdict(outcome)).encode() + b"\n"
            )
        return outcome


def _train(
    config: RunConfig,
    folder: RunFolder,
    data_from: DataFrom,
    image_shape: tuple[int, int, int],
    low_res_shape: tuple[int, int, int] | None,
    grid_examples: Records,
    checkpoints: CheckpointWriter,
    stop: _StopRequest,
) -> Outcome:
    train_config, total = config.train, config.train.train_steps
    mesh = mesh_lib.build_mesh(config.mesh)
    stage = build_stage(config.stage)

    state = _restore_or_init(stage, config, mesh, checkpoints)
    first_step = int(state.step)
    print_parameter_overview(state.params)
    start = time.monotonic()
    train_step, flops_per_step = step_lib.compile_train_step(
        step_lib.make_train_step(stage, train_config, mesh),
        state,
        image_shape,
        train_config.batch_size,
        mesh,
        low_res_shape=low_res_shape,
    )
    compile_secs = time.monotonic() - start
    print(
        f"{config.stage.name}: train step compiled in {compile_secs:.1f} s,"
        f" {flops_per_step / 1e9:.1f} GFLOP (multiply-add = 2) for {train_config.batch_size}"
        f" images, on {mesh.size} {jax.devices()[0].platform} device(s)",
        flush=True,
    )
    if first_step:
        print(f"{config.stage.name}: going on from step {first_step}", flush=True)

    writes = jax.process_index() == 0
    writer = MetricWriter(folder, resume_step=first_step) if writes else None
    sample_grid = _GridSampler(stage, config, mesh, grid_examples)
    local_batches = data_from(first_step)
    batches = mesh_lib.DeviceBatches(local_batches, mesh)
    progress = Progress(total, unit="steps", label=config.stage.name, initial=first_step)
    clock = _Clock(train_config.batch_size, flops_per_step)
    reason, step, saved_step = "complete", first_step, first_step
    pending: step_lib.Metrics | None = None

    def read_metrics(at_step: int, metrics: step_lib.Metrics) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(values, at_step, checkpoints)
        clock.step_done()
        if at_step % train_config.log_every_steps == 0 or at_step == total:
            speed = clock.read()
            skipped = getattr(local_batches, "num_skipped", 0)
            if writer is not None:
                writer.write_scalars(at_step, {**values, **speed, "data_skipped_records": skipped})
            details = {"skipped_records": str(skipped)} if skipped else {}
            progress.update(
                at_step,
                loss=f"{values['loss']:.4f}",
                images_per_sec=f"{speed['images_per_sec']:.0f}",
                data_wait=f"{100 * speed['data_wait_fraction']:.0f} %",
                **details,
            )

    with contextlib.closing(progress), contextlib.closing(batches):
        while step < total:
            if folder.asked_to_stop(config.eval.patience_evals):
                reason = "early_stop"
                break
            waited = time.monotonic()
            records = next(batches)
            clock.data_waited(time.monotonic() - waited)
            state, metrics = train_step(state, records)
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
                            writer.write_image(step, "ema_samples", grid)
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


def _check_finite(values: dict[str, float], step: int, checkpoints: CheckpointWriter) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        kept = checkpoints.steps()
        raise UserError(
            f"{bad[0]} is {values[bad[0]]} at step {step}: training has diverged; nothing of this"
            f" step was saved (last checkpoint: {kept[-1] if kept else 'none'}); lower"
            " config.train.learning_rate or config.train.grad_clip_norm"
        )


class _Clock:
    """Rates between two readings, with pauses (saving, sampling) left out."""

    def __init__(self, batch_size: int, flops_per_step: float):
        self._batch_size, self._flops_per_step = batch_size, flops_per_step
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step_done(self) -> None:
        self._steps += 1

    def data_waited(self, seconds: float) -> None:
        self._waited += seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._start += time.monotonic() - began

    def read(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rates = {
            "images_per_sec": self._steps * self._batch_size / elapsed,
            "data_wait_fraction": min(1.0, self._waited / elapsed),
            "model_flops_per_sec": self._steps * self._flops_per_step / elapsed,
        }
        self._restart()
        return rates
