"""Sampling a cascade into a folder, with a picture, together with the other processes of a job."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.config.schema import CascadeSection
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_request import SampleRequest
from cascaded_diffusion.evaluation.samples.sample_sources import shrunk
from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError, SampleStore
from cascaded_diffusion.evaluation.samples.stored_images import save_sample_batches
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.files.bucket import BucketPath
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.files.paths import printable
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.mesh import fail_on_all_processes
from cascaded_diffusion.runtime.run_data import trained_classes

# How the samples beside it were made, and which files these are.
_ABOUT = "samples.json"
# The samples of the picture are among this many first ones.
_SHOWN = 2000
_POLL_SECS = 0.5
# The largest number of images in a row and of classes in a picture.
_COLUMNS, _CLASSES = 10, 20
# An image's size in pixels, and that where real images stand beside samples in longer rows.
_CELL, _SMALL_CELL = 96, 64

# Captions and images, uint8 [n, h, w, C].
_Rows = list[tuple[str, np.ndarray]]


def sample_cascade(
    request: SampleRequest,
    *,
    real: Callable[[], LabelledImages] | None = None,
    mesh: Mesh | None = None,
) -> list[str]:
    """Makes samples and writes them to the request's folder; resumes what an earlier call left.

    Every process of a job calls this. The batches are divided among the processes, each of which
    samples on its own devices; process 0 writes the files and returns their names. `real` returns
    the real images of the picture, which has none by default. `mesh` is of this process's devices,
    by default the config's over all of them.

    Raises UserError if a checkpoint, the output or the devices do not allow it, the processes see
    different things, or a sample is not finite.
    """
    section, output = request.config.cascade, request.output
    if mesh is None:
        check_devices(request.config, jax.local_device_count())
        mesh = mesh_lib.build_mesh(request.config.mesh, jax.local_devices())
    with fail_on_all_processes():
        real_images = None if real is None else real()
        trained = [load_trained(folder, mesh) for folder in request.folders]
    mesh_lib.check_shared(output.path, "output")
    not_run = [None] * request.first
    stages = [*not_run, *(t.stage for t in trained)]
    params = [*not_run, *(t.params for t in trained)]
    sampler = generate.make_cascade_sampler(
        Cascade(stages=stages, samplers=section.samplers, truncated=section.truncated),
        section.aug_levels,
        seed=section.seed,
        mesh=mesh,
        labels=request.labels,
        below=None if request.low_res is None else request.low_res.images,
        first=request.first,
    )
    identity = {**request.identity(), "stages": [t.identity for t in trained]}
    with fail_on_all_processes():
        store = SampleStore(
            output.path / ".batches",
            identity,
            num_samples=section.num_samples,
            batch_size=min(section.batch_size, section.num_samples),
        )
    with fail_on_all_processes():
        if not mesh_lib.is_as_in_process_0(store.number):
            raise UserError(
                f"--workdir={request.workdir}: the processes found other checkpoints, labels or"
                " images when they started; run the same command again"
            )
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with fail_on_all_processes():
            if is_first:
                stack.enter_context(output.writer_lock("sample"))
                store.failed.unlink(missing_ok=True)
                _print_work(trained, store)
        _fill(request, store, generate.cascade_maker(sampler, params, request.labels), mesh.size)
        if not is_first:
            return []
        try:
            files = _file_names(request)
            # What an earlier command wrote says nothing about what is written now.
            (output.path / _ABOUT).unlink(missing_ok=True)
            _write_samples(request, store)
            shown = store.first(_SHOWN)
            picture = _picture(request, shown, trained, real_images, mesh)
            pictures.save_png(output.path / "samples.png", picture)
            if "classes.png" in files:
                last = shown[f"images_{len(request.stages) - 1}"]
                rows = _class_rows(request, last, shown["labels"])
                scale = max(1, _CELL // last.shape[1])
                picture = pictures.labelled_rows(rows, scale=scale)
                pictures.save_png(output.path / "classes.png", picture)
            about = {"what": request.title(), "num_samples": section.num_samples, **identity}
            write_json(output.path / _ABOUT, {**about, "files": files})
        except DamagedBatchError as e:
            raise UserError(str(e)) from e
        except OSError as e:
            raise _cannot_write(request, e) from e
        store.remove()
        with contextlib.suppress(OSError):  # another cascade's batches are there
            if not isinstance(output.path, BucketPath):
                (output.path / ".batches").rmdir()
    print(f"{request.title()}: in {output.path}: {', '.join(files)}", flush=True)
    return files


def _cannot_write(request: SampleRequest, e: OSError) -> UserError:
    reason = os.strerror(e.errno) if e.errno else e  # `strerror` may say already what failed
    return UserError(f"--output={request.output.path}: cannot be written ({reason})")


def _fill(
    request: SampleRequest, store: SampleStore, make: generate.BatchMaker, num_devices: int
) -> None:
    """Fills the store together with the other processes. If one of them fails, all raise."""
    error = None
    try:
        label = "cascade" if request.low_res is None else "enlarging"
        generate.fill(store, make, label=label, devices=num_devices)
    except ValueError as e:
        remedy = "lower config.cascade.samplers.N.guidance_scale, or set its threshold"
        error = UserError(f"{e}: {remedy}")
    except OSError as e:
        error = _cannot_write(request, e)
    if error is not None:
        with contextlib.suppress(OSError):  # on a full disk, for one; they notice its absence
            write_whole(store.failed, b"")
    # This may take hours, and no collective would wait so long.
    while store.missing() and not store.failed.exists():
        time.sleep(_POLL_SECS)
    mesh_lib.raise_on_all_processes(error)


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


def _file_names(request: SampleRequest) -> list[str]:
    """All that is written; `_ABOUT`, which tells how the others were made, is the last."""
    names = [*request.npz_names(), "samples.png"]
    if request.stages[-1].num_classes and request.low_res is None:
        names.append("classes.png")
    return [*names, *(["png/"] if request.png_paths else []), _ABOUT]


def _write_samples(request: SampleRequest, store: SampleStore) -> None:
    """Writes the samples of every stage that was run, and the images of the last as PNG files."""
    for i, (name, stage) in enumerate(zip(request.npz_names(), request.stages, strict=True)):
        key = f"images_{i}"
        save_sample_batches(
            request.output.path / name,
            (store.num_samples, stage.resolution, stage.resolution, stage.channels),
            lambda key=key: ((b[key], b["labels"]) for b in store.batches()),
        )
    if request.png_paths:
        images = (image for b in store.batches() for image in b[key])
        pictures.save_png_folder(request.output.path / "png", request.png_paths, images)


def _picture(
    request: SampleRequest,
    samples: generate.Arrays,
    trained: Sequence[TrainedStage],
    real: LabelledImages | None,
    mesh: Mesh,
) -> np.ndarray:
    """A picture, uint8 [h, w, 3], of the first samples of a request, from `SampleStore.first`.

    It shows given images with their enlargements below them, or real images with their
    enlargements and samples of the same classes, or a row of samples per class.
    """
    size, names = request.stages[-1].resolution, []
    images = [samples[f"images_{i}"] for i in range(len(request.stages))]
    if request.low_res is not None:
        rows = _enlarged_rows(request, images)
    elif real is None:
        rows = _class_rows(request, images[-1], samples["labels"])
    else:
        order = np.argsort(real.labels, kind="stable")
        real = LabelledImages(real.images[order], real.labels[order])
        rows = _real_rows(request.config.cascade, trained, real, mesh)
        rows += _sampled_rows(request, images, _rows_with_labels(samples["labels"], real.labels))
        if request.stages[-1].num_classes:
            called = _class_names(request)
            names = [called.get(label, str(label)) for label in real.labels.tolist()]
    # Small images are shown enlarged, pixel by pixel.
    scale = max(1, (_CELL if real is None else _SMALL_CELL) // size)
    enlarged = [(caption, pictures.enlarge_nearest(x, size)) for caption, x in rows]
    return pictures.labelled_rows(enlarged, scale=scale, names=names)


def _class_names(request: SampleRequest) -> dict[int, str]:
    """What the last stage's classes are called, by label, as far as that is known."""
    names = trained_classes(request.folders[-1]) or ()
    return {label: printable(name) for label, name in enumerate(names)}


def _real_rows(
    section: CascadeSection, trained: Sequence[TrainedStage], real: LabelledImages, mesh: Mesh
) -> _Rows:
    size = trained[-1].stage.config.resolution
    rows = [(f"real, {size} px", shrunk(real, size).images)]
    count = len(real.images)
    padded = np.resize(np.arange(count), -(-count // mesh.size) * mesh.size)
    above = zip(trained[1:], section.samplers[1:], section.aug_levels, strict=True)
    for t, sampler, level in above:
        low = t.stage.config.low_res_resolution
        low_res = shrunk(real, low)
        how = dict(sampler=sampler, seed=section.seed, mesh=mesh)
        enlarge = generate.make_enlarger(t.stage, low_res, **how)
        print(f"enlarging {count} real {low} px images", flush=True)
        enlarged = mesh_lib.host_array(enlarge(t.params, padded, level))[:count]
        caption = f"real {low} px images enlarged by {t.stage.config.name}, aug_level {level:g}"
        rows += [(f"real, {low} px", low_res.images), (caption, enlarged)]
    return rows


def _sampled_rows(request: SampleRequest, images: list[np.ndarray], chosen: np.ndarray) -> _Rows:
    section, rows = request.config.cascade, []
    mode = "truncated" if section.truncated else "non-truncated"
    for i, (stage, stage_images) in enumerate(zip(request.stages, images, strict=True)):
        caption = f"sampled by {stage.name}, {stage.resolution} px"
        if i > 0:
            caption += f" (from the row above, aug_level {section.aug_levels[i - 1]:g}, {mode})"
        rows.append((caption, stage_images[chosen]))
    return rows


def _enlarged_rows(request: SampleRequest, images: Sequence[np.ndarray]) -> _Rows:
    given = request.low_res.images[:_COLUMNS]
    levels = request.config.cascade.aug_levels[request.first - 1 :]
    return [(f"given, {given.shape[1]} px", given)] + [
        (f"enlarged by {x.name}, {x.resolution} px, aug_level {level:g}", enlarged[:_COLUMNS])
        for x, level, enlarged in zip(request.stages, levels, images, strict=True)
    ]


def _class_rows(request: SampleRequest, images: np.ndarray, labels: np.ndarray) -> _Rows:
    called, rows = _class_names(request), []
    for label in sorted(set(labels.tolist()))[:_CLASSES]:
        name = called.get(label, str(label))
        caption = f"class {label}" if name == str(label) else f"class {label} ({name})"
        rows.append((caption, images[labels == label][:_COLUMNS]))
    return rows


def _rows_with_labels(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted label, the first unused row that has it, or else any row."""
    free = {label: list(np.flatnonzero(labels == label)[::-1]) for label in set(labels.tolist())}
    return np.asarray(
        [free[w].pop() if free.get(w) else i % len(labels) for i, w in enumerate(wanted.tolist())]
    )
