"""Sampling a cascade into a folder, together with the other processes of a job."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.samples import cascade_picture, generate
from cascaded_diffusion.evaluation.samples.sample_request import SampleRequest
from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError, SampleStore
from cascaded_diffusion.evaluation.samples.stored_images import save_sample_batches
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.runtime.mesh import (
    broadcast_from_process_0,
    build_mesh,
    check_shared,
    fail_on_all_processes,
)
from cascaded_diffusion.runtime.pictures import save_png, save_png_folder
from cascaded_diffusion.types import Params

# The samples of the picture are among this many first ones.
_SHOWN = 2000


def sample_cascade(
    request: SampleRequest,
    *,
    real: Callable[[], LabelledImages] | None = None,
    mesh: Mesh | None = None,
) -> list[str]:
    """Makes samples and writes them to the request's folder; resumes what an earlier call left.

    Every process of a job must call this. The batches are divided among the processes, each of
    which samples on its own devices; process 0 writes the files.

    Args:
      request: what to make.
      real: returns the real images of the picture; by default it has none.
      mesh: of this process's devices; by default the config's over all of them.

    Returns:
      The names of the files; none in the other processes.

    Raises:
      UserError: a checkpoint, the output or the devices do not allow it, the processes see
        different things, or a sample is not finite.
    """
    section, output = request.config.cascade, request.output
    if mesh is None:
        check_devices(request.config, jax.local_device_count())
        mesh = build_mesh(request.config.mesh, jax.local_devices())
    with fail_on_all_processes():
        real_images = None if real is None else real()
        trained = [load_trained(folder, mesh) for folder in request.folders]
    check_shared(output.path, "output")
    not_run = [None] * request.first
    cascade = Cascade(
        stages=[*not_run, *(t.stage for t in trained)],
        samplers=section.samplers,
        truncated=section.truncated,
    )
    params = [*not_run, *(t.params for t in trained)]
    sampler = generate.make_cascade_sampler(
        cascade,
        section.aug_levels,
        seed=section.seed,
        mesh=mesh,
        labels=request.labels,
        below=None if request.low_res is None else request.low_res.images,
        first=request.first,
    )
    with fail_on_all_processes():
        store = SampleStore(
            output.path / ".batches",
            {**request.identity(), "stages": [t.identity for t in trained]},
            num_samples=section.num_samples,
            batch_size=min(section.batch_size, section.num_samples),
        )
    with fail_on_all_processes():
        if broadcast_from_process_0([store.number]) != [store.number]:
            raise UserError(
                f"--workdir={request.workdir}: the processes found other checkpoints, labels or"
                " images when they started; run the same command again"
            )
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with fail_on_all_processes():
            if is_first:
                stack.enter_context(output.writer_lock("sample"))
                store.clear_failure()
                _print_work(trained, store)
        generate.fill_on_all_processes(
            store,
            generate.cascade_maker(sampler, params, request.labels),
            devices=mesh.size,
            label="cascade" if request.low_res is None else "enlarging",
            name=f"--output={output.path}",
        )
        if not is_first:
            return []
        try:
            files = _write_files(request, store)
            picture = _picture(request, store, cascade, params, real_images, mesh)
            save_png(output.path / "samples.png", picture)
        except DamagedBatchError as e:
            raise UserError(str(e)) from e
        except OSError as e:
            raise UserError(f"--output={output.path}: cannot be written ({e.strerror or e})") from e
        store.remove()
        with contextlib.suppress(OSError):  # another cascade's batches are there
            (output.path / ".batches").rmdir()
    print(f"{request.title()}: in {output.path}: {', '.join(files)}", flush=True)
    return files


def _print_work(trained: Sequence[TrainedStage], store: SampleStore) -> None:
    """Prints what is sampled, and which samples another command left unfinished."""
    for t in trained:
        print(t.name, flush=True)
    for other in store.others():
        wanted, batch_size = other.settings["num_samples"], other.settings["batch_size"]
        print(
            f"{other.folder}: {other.num_samples} of {wanted} samples ({other.num_bytes / 1e6:.1f}"
            f" MB) that were made with other settings (batches of {batch_size}); that command"
            " resumes them; if it will not be run again, remove the folder",
            flush=True,
        )


def _write_files(request: SampleRequest, store: SampleStore) -> list[str]:
    """Writes the samples of every stage that was run. Returns the names of all files."""
    names = request.npz_names()
    for i, (name, config) in enumerate(zip(names, request.run_configs, strict=True)):
        stage = config.stage
        shape = (stage.resolution, stage.resolution, stage.channels)
        save_sample_batches(
            request.output.path / name,
            (store.num_samples, *shape),
            lambda key=f"images_{i}": ((b[key], b["labels"]) for b in store.batches()),
        )
    if not request.png:
        return [*names, "samples.png"]
    key = f"images_{len(names) - 1}"
    folder: pathlib.Path = request.output.path / "png"
    save_png_folder(
        folder, request.png_paths(), (image for b in store.batches() for image in b[key])
    )
    return [*names, "samples.png", "png/"]


def _picture(
    request: SampleRequest,
    store: SampleStore,
    cascade: Cascade,
    params: Sequence[Params | None],
    real: LabelledImages | None,
    mesh: Mesh,
) -> np.ndarray:
    """The content of `samples.png`: uint8 [h, w, 3]."""
    first, section = store.first(_SHOWN), request.config.cascade
    images = [first[f"images_{i}"] for i in range(len(request.run_configs))]
    if request.low_res is not None:
        return cascade_picture.enlarged_picture(
            request.low_res.images,
            images,
            [config.stage for config in request.run_configs],
            section.aug_levels[request.first - 1 :],
        )
    if real is None:
        return cascade_picture.classes_picture(images[-1], first["labels"], request.class_names)
    return cascade_picture.cascade_picture(
        cascade,
        params,
        section.aug_levels,
        images,
        first["labels"],
        real,
        seed=section.seed,
        mesh=mesh,
    )
