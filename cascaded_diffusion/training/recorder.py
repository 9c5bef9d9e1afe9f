"""What training shows and keeps of its steps: metrics, rates, sample grids, checkpoints."""

import math
import time
from collections.abc import Iterator
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import RunConfig, ema_name
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import monitor, pictures
from cascaded_diffusion.runtime.accelerators import accelerator_of
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.metric_writer import MetricWriter
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import nonfinite
from cascaded_diffusion.training.clock import Clock
from cascaded_diffusion.training.step import Metrics, TrainState
from cascaded_diffusion.types import Params

Records = dict[str, np.ndarray]
# Size of a sample grid.
GRID_ROWS, GRID_COLUMNS = 4, 10

# A compilation is reported after this many steps, and if it takes more than this many seconds.
_FIRST_STEPS, _REPORTED_COMPILE_SECS = 3, 1.0


class GridSampler:
    """Makes grids of EMA samples, always from the same noise and labels.

    `stage` comes from `step.stage_for_sampling`, so its parameters may be split over the mesh. A
    super-resolution stage enlarges the low-res versions of `examples`, which are real images.
    """

    def __init__(self, stage: Stage, config: RunConfig, mesh: Mesh, examples: Records):
        num_classes = stage.config.num_classes
        self._key = jax.random.key(config.eval.seed)
        self._indices = np.arange(len(examples["label"]))
        label = self._indices % num_classes if num_classes else None
        low_res, level = None, None
        if stage.augment is not None:
            if "low_res" in examples:  # stored, as those it is trained on
                low_res = np.asarray(float_from_uint8(examples["low_res"]))
            else:
                low_res = np.asarray(stage.low_res_from(float_from_uint8(examples["image"])))
            label = examples["label"] if num_classes else None
            level = config.eval.aug_level if stage.config.has_aug_level else None
        self._given = {"label": label, "low_res": low_res}

        def sample(
            params: Params, key: jax.Array, indices: jax.Array, given: dict[str, jax.Array | None]
        ) -> jax.Array:
            keys = keys_for(key, indices)
            return uint8_from_float(stage.sample(params, keys, aug_level=level, **given))

        self._sample = jax.jit(sample, out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, params: Params) -> np.ndarray:
        """One picture, uint8 [H, W, C], of samples from `params`."""
        images = self._sample(params, self._key, self._indices, self._given)
        return pictures.grid(np.asarray(images), columns=GRID_COLUMNS)


class Recorder:
    """Logs, saves and samples when a step calls for it. All processes call it at the same steps.

    Metrics are read one step late: the devices work on a step while the host reads the numbers
    of the one before. A context manager; it counts compilations while it is open.

    `local_batches` are this process's and may count their `num_skipped` records. Training resumes
    from `first_step`, and its step has `flops_per_step` and took `compile_secs` to compile.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        mesh: Mesh,
        checkpoints: CheckpointWriter,
        make_grid: GridSampler | None,
        local_batches: Iterator[Records],
        first_step: int,
        flops_per_step: float,
        compile_secs: float,
    ):
        self._config, self._checkpoints, self._make_grid = config, checkpoints, make_grid
        self._folder = folder
        self._local_batches, self._compile_secs = local_batches, compile_secs
        self._total = config.train.train_steps
        self._first_step = self._saved_step = first_step
        silent = jax.process_index() != 0
        self._writer = None if silent else MetricWriter(folder, resume_step=first_step)
        self._progress = Progress(
            self._total, unit="steps", label=config.stage.name, initial=first_step, silent=silent
        )
        self.say = self._progress.say
        accelerator = accelerator_of(jax.devices()[0].device_kind)
        peak = None if accelerator is None else mesh.size * accelerator.peak_flops
        self._clock = Clock(config.train.batch_size, flops_per_step, peak_flops=peak, say=self.say)
        self._compiles = monitor.CompileWatch()
        self._pending: tuple[int, Metrics] | None = None
        self._nonfinite = nonfinite.NonFiniteSteps(
            config.train, folder, first_step=first_step, writes=not silent
        )

    def __enter__(self) -> Self:
        self._compiles.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        self._compiles.__exit__(error, *details)
        self._progress.close()
        if error is None and self._writer is not None:
            self._writer.close()

    def next_of(self, batches: Iterator[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """The next batch. Measures how long it is waited for."""
        start = time.monotonic()
        records = next(batches)
        self._clock.data_waited(time.monotonic() - start)
        return records

    def add(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Takes a dispatched step's metrics, and the state after it.

        Raises UserError if too many steps were not finite.
        """
        self._read_pending()
        self._latest, self._pending = (step, state), (step, metrics)
        if self._nonfinite.near(step):
            # The state must still be there if this step is the last that is tolerated.
            self._read_pending()

    def keep(self, step: int, state: TrainState, *, stopping: bool) -> None:
        """Saves and samples from the state after `step` where it is time, or `stopping`."""
        last, every = step == self._total, self._config.train.sample_every_steps
        save = step % self._config.checkpoint.save_every_steps == 0 or last or stopping
        sample = every is not None and (step % every == 0 or last)
        if not (save or sample):
            self._report_compilations(step)
            return
        self._read_pending()
        with self._clock.pause():
            if save:
                self._checkpoints.save(step, state)
                self._saved_step = step
            if sample:
                ema = ema_name(self._config.eval.ema_decays[0])
                grid = self._make_grid(state.ema_params[ema])
                if self._writer is not None:
                    self._writer.write_image(step, "ema_samples", grid)
        self._compiles.take()  # saving and sampling compile once

    def finish(self, step: int, state: TrainState) -> None:
        """Reads what is left to read, and saves the state after the last step."""
        self._read_pending()
        if step > self._saved_step:
            self._checkpoints.save(step, state)
        if step > self._first_step:
            self._checkpoints.wait(step)

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        squares = metrics.pop("grad_squares")
        values = {name: float(value) for name, value in metrics.items()}
        if not nonfinite.are_finite(values):
            self._tolerate(step, values, squares)
        if step == self._first_step + 1 and (secs := monitor.secs_since_start()) is not None:
            name = self._config.stage.name
            self.say(f"{name}: first step done {secs:.1f} s after the start")
        self._clock.step_done(step)
        if step % self._config.train.log_every_steps and step != self._total:
            return
        speed = {**self._clock.read(), **monitor.peak_memory()}
        num_skipped = getattr(self._local_batches, "num_skipped", 0)
        if self._writer is not None:
            counts = {"compile_secs": self._compile_secs, "data_skipped_records": num_skipped}
            if self._nonfinite.count:
                counts["nonfinite_steps"] = self._nonfinite.count
            finite = {name: x for name, x in values.items() if math.isfinite(x)}
            self._writer.write_scalars(step, {**finite, **speed, **counts})
        details = {"skipped_records": str(num_skipped)} if num_skipped else {}
        if "model_flops_utilization" in speed:
            details["mfu"] = f"{100 * speed['model_flops_utilization']:.0f} %"
        self._progress.update(
            step,
            loss=f"{values['loss']:.4f}",
            images_per_sec=f"{speed['images_per_sec']:.0f}",
            data_wait=f"{100 * speed['data_wait_fraction']:.0f} %",
            **details,
        )

    def _tolerate(self, step: int, values: dict[str, float], squares: np.ndarray) -> None:
        """Records a step that is not finite. Raises UserError if it is one too many."""
        at, state = self._latest
        leaves = nonfinite.bad_leaves(nonfinite.leaf_names(state.params), squares)
        records = None
        if hasattr(self._local_batches, "records_of"):
            records = self._local_batches.records_of(step - 1, self._config.train.batch_size)
        what = nonfinite.described(values, leaves)
        too_many = self._nonfinite.add(step, values, leaves, records)
        if too_many is None:
            self.say(
                f"step {step} is not finite and was skipped ({what}); the records of its batch are"
                f" in {self._folder.nonfinite_log}"
            )
            return
        last = max(self._checkpoints.steps(), default="none")
        dump = nonfinite.state_path(self._folder, step)
        see = (
            f"see what the step does by `python -m cascaded_diffusion.main --replay={dump.parent}`"
        )
        try:
            if at == step:
                self._checkpoints.write_apart(dump, state)
                if self._writer is not None:
                    self._nonfinite.store(step, values, leaves)
        except (UserError, OSError) as e:
            see = f"its state could not be written ({e})"
        raise UserError(
            f"{too_many}, the last of them step {step} ({what}): training has diverged; none of"
            f" them has changed anything (last checkpoint: {last}); lower"
            f" config.train.learning_rate or config.train.grad_clip_norm; {see}"
        )

    def _report_compilations(self, step: int) -> None:
        if step <= self._first_step + _FIRST_STEPS:
            return
        count, secs = self._compiles.take()
        if secs > _REPORTED_COMPILE_SECS:
            self.say(
                f"recompilation: {count} program(s) in {secs:.1f} s at step {step}; the step itself"
                " is compiled only once"
            )
