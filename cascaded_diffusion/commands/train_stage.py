"""Training of one stage, from its config to the outcome: `train_stage`."""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.commands.run_images import with_absolute_paths
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.data.loader import Stream, build_stream, iterate
from cascaded_diffusion.data.records import Source
from cascaded_diffusion.data.sources import load_splits, spread_examples
from cascaded_diffusion.data.splits import overlap
from cascaded_diffusion.errors import UserError, is_out_of_memory
from cascaded_diffusion.files.paths import printable
from cascaded_diffusion.planning import fit
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_data import RunData
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training.loop import Outcome, train
from cascaded_diffusion.training.recorder import GRID_COLUMNS, GRID_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A stage's images and its place on the devices."""

    config: RunConfig  # with absolute paths
    placed: RunConfig  # with the mesh that was chosen
    path_as_given: str | None
    sources: dict[str, Source]  # by split
    stream: Stream  # this process's batches
    mesh: Mesh
    memory_bytes: int  # of a device
    notes: list[str]  # about the choice of the mesh and its memory

    @property
    def source(self) -> Source:
        """The images to train on."""
        return self.sources[self.config.data.train_split]


def train_stage(
    config: RunConfig,
    folder: RunFolder,
    *,
    data_path: str | None = None,
    start_over: bool = False,
    allow_changed: Collection[str] = (),
    profile_steps: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
) -> Outcome:
    """Trains a stage on this process's devices, or resumes the run that is in the folder.

    Where `config.mesh.fsdp` is None, the smallest one that fits is chosen. `data_path` is where the
    images are now, if they were moved, copied or touched. `notes` are printed once all checks have
    passed. The other arguments are those of `train`.

    Raises UserError if the data cannot be read, the devices or their memory do not suffice, the
    folder holds another run, or training fails. Nothing is written before all checks have passed.
    """
    given = prepared(config, data_path)
    config, source = given.config, given.source
    held_out = given.sources[config.data.eval_split]
    with mesh_lib.fail_on_all_processes():
        grid_examples = spread_examples(held_out, rows=GRID_ROWS, columns=GRID_COLUMNS)
    if jax.process_index() == 0:
        for line in [*notes, *given.notes]:
            print(f"{config.stage.name}: {line}", flush=True)
    try:
        return train(
            config,
            folder,
            lambda start_step: iterate(given.stream, source, config.data, start_step=start_step),
            image_shape=source.image_shape,
            low_res_shape=source.low_res_shape,
            data=RunData(
                splits=given.sources,
                path=config.data.path,
                path_as_given=given.path_as_given,
                given_anew=data_path is not None,
            ),
            start_over=start_over,
            allow_changed=allow_changed,
            grid_examples=grid_examples,
            profile_steps=profile_steps,
            mesh=given.mesh,
        )
    except jax.errors.JaxRuntimeError as e:
        if not is_out_of_memory(e):
            raise
        about = fit.out_of_memory(given.placed, jax.device_count(), given.memory_bytes)
        line = f"out of memory ({str(e).splitlines()[0]}): {about}"
        raise UserError(line) from e


def prepared(config: RunConfig, data_path: str | None) -> Prepared:
    """Loads a stage's images and places it on the devices. Raises UserError like `train_stage`."""
    path_as_given = data_path or config.data.path
    config = with_absolute_paths(config, data_path)
    build_stage(config.stage)
    splits = [config.data.train_split, config.data.eval_split]
    with mesh_lib.fail_on_all_processes():
        sources = load_splits(config.data, list(dict.fromkeys(splits)), config.stage)
    facts = {name: (source.identity, source.class_names) for name, source in sources.items()}
    same_everywhere = mesh_lib.is_as_in_process_0(facts)
    with mesh_lib.fail_on_all_processes():
        if not same_everywhere:
            found = "; ".join(
                f"{name!r} is {source.identity!r}" for name, source in sources.items()
            )
            raise UserError(
                f"config.data: process {jax.process_index()} finds other images or classes than"
                f" process 0 does ({found}); give all hosts the same images"
            )
    # The first process decides, so that all processes have the same mesh.
    (memory_mib,) = mesh_lib.broadcast_from_process_0([int(fit.device_bytes() / 2**20)])
    memory_bytes, num_devices = memory_mib * 2**20, jax.device_count()
    placed, choice = fit.choose_fsdp(config, num_devices, memory_bytes)
    check_devices(placed, num_devices)
    notes = [choice] if choice else []
    if warning := fit.check_memory(placed, num_devices, memory_bytes):
        notes.append(f"warning: {warning}")
    if absent := _classes_without_images(sources[splits[0]]):
        notes.append(
            f"warning: config.data.train_split = {splits[0]!r} has no image of the class"
            f" {', '.join(absent[:5])}" + f", and of {len(absent) - 5} more" * (len(absent) > 5)
        )
    if overlap(*splits):
        notes.append(
            f"warning: config.data.eval_split = {splits[1]!r} has images of train_split ="
            f" {splits[0]!r}: what is measured as held out was trained on"
        )
    mesh = mesh_lib.build_mesh(placed.mesh)
    index, count = mesh_lib.batch_share(mesh)
    with mesh_lib.fail_on_all_processes():
        stream = build_stream(
            sources[config.data.train_split],
            config.data,
            global_batch_size=config.train.batch_size,
            process_index=index,
            process_count=count,
        )
    return Prepared(
        config=config,
        placed=placed,
        path_as_given=path_as_given,
        sources=sources,
        stream=stream,
        mesh=mesh,
        memory_bytes=memory_bytes,
        notes=notes,
    )


def _classes_without_images(source: Source) -> list[str]:
    """The names of such classes, as far as the labels are known without reading all images."""
    if source.class_counts is None or not source.class_names:
        return []
    counts = zip(source.class_names, np.asarray(source.class_counts), strict=True)
    return [printable(name) for name, count in counts if not count]


def print_outcome(outcome: Outcome, config: RunConfig, folder: RunFolder) -> None:
    """One line about how the training ended, from the first process."""
    if outcome.reason == "preempted":
        what = f"stopped by a signal at step {outcome.step}, saved; run it again to resume"
    elif outcome.reason == "early_stop":
        what = (
            f"stopped early at step {outcome.step}, as {folder.early_stop_path} asks; to resume"
            f" all the same, {folder.how_to_resume()}"
        )
    else:
        what = f"finished, {outcome.step} steps ({folder.path})"
    if jax.process_index() == 0:
        print(f"{config.stage.name}: {what}", flush=True)
