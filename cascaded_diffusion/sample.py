"""Samples a cascade of trained stages, at the checkpoints that evaluation chose.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade32.py --workdir=RUN

reads the runs RUN/<stage> that the config names (without --config: the cascade that
`evaluate --sweep --write_best` left in RUN/cascade.json) and writes, below --output:

    samples.npz   arr_0 uint8 [n, H, W, C], arr_1 int64 labels [n] (ADM style)
    <stage>.npz   the same for every earlier stage (if truncated, still noisy and cut)
    samples.png   per class: real, low-res, enlarged real, base and cascade images
    png/          with --png: every image of samples.npz as a file

Which classes, and how many of each (--output is RUN/chosen_classes by default, else
RUN/samples):

    --labels=3,7        these alone, in turn: numbers, or names of the data's classes
    --labels=FILE       .txt (one per line), .npz or .npy: one for each sample, or in turn
    --per_class=8       so many of every class, or of each of --labels

Images of your own are enlarged (--output is RUN/enlarged by default) by

    --low_res=FOLDER --labels=3,7 --png

a folder of images, one image, or an .npz (arr_0, and arr_1 as labels). Their size says
which stage is the first; --resize_low_res=16 cuts out centre squares and shrinks them.
cat.jpg becomes png/cat.png. The given images are noised to the aug_level of the first stage,
in a truncated cascade too. Here --workdir may also be the run of one super-resolution
stage; its sampler is then that of its config, its level `eval.aug_level`, and
--config.cascade.aug_levels=(0.2,) or --config.cascade.samplers.1.num_steps=20 set others.

Sample i depends on (seed, i), its label and its low-res image alone: for another batch size,
number of devices or of hosts it is the same but for float rounding, a grey level or two in a
few pixels.

Samples are kept batch by batch while they are made: the same command run again goes on
with the batches that are missing, on however many hosts. Several processes, started as for
`main`, divide the batches among them; --output is one folder that all of them see.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from cascaded_diffusion.commands import cluster_flags, config_flags, entry, flag_checks, jax_setup
from cascaded_diffusion.commands.run_images import open_splits
from cascaded_diffusion.commands.sample_inputs import Request, define_inputs, read_request
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:  # these import JAX, which wants to be set up first
    from jax.sharding import Mesh

    from cascaded_diffusion.cascade.cascade import Cascade
    from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
    from cascaded_diffusion.evaluation.samples.sample_store import SampleStore
    from cascaded_diffusion.evaluation.trained import TrainedStage

# So many samples, at most, are looked through for those of the picture.
_SHOWN = 2000


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(
        fv, argv, "the cascade's config file, e.g. configs/mnist_cascade32.py"
    )
    define_inputs(fv)
    flags.DEFINE_bool(
        "png", False, "write every image as a PNG file too, below OUTPUT/png", flag_values=fv
    )
    cluster_flags.define_cluster(fv)
    config_flags.parse(fv, argv, __doc__)
    flag_checks.require(fv, "workdir")
    request = read_request(fv, argv)
    section, output = request.config.cascade, request.output
    output.check_writable()
    png_folder = output.path / "png"
    if png_folder.is_dir() and any(png_folder.iterdir()):
        raise UserError(
            f"--output={output.path}: {png_folder} has the images of other samples; move it, or"
            " choose another --output"
        )

    cluster = cluster_flags.join_cluster(fv, request.config, "workdir", "output")
    jax = jax_setup.set_up_jax(cluster)
    from cascaded_diffusion.cascade.cascade import Cascade
    from cascaded_diffusion.evaluation.samples import generate
    from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError, SampleStore
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import (
        broadcast_from_process_0,
        build_mesh,
        check_shared,
        fail_on_all_processes,
    )
    from cascaded_diffusion.runtime.pictures import save_png

    # Every process samples by itself, on its own devices: nothing has to meet.
    check_devices(request.config, jax.local_device_count())
    mesh = build_mesh(request.config.mesh, jax.local_devices())
    with fail_on_all_processes():
        real = None if request.low_res is not None or request.chosen else _real_images(request)
        trained = [load_trained(folder, mesh) for folder in request.folders]
    check_shared(output.path, "output")
    is_first = jax.process_index() == 0
    not_run = [None] * request.first
    cascade = Cascade(
        stages=[*not_run, *(t.stage for t in trained)],
        samplers=section.samplers,
        truncated=section.truncated,
    )
    params = [*not_run, *(t.params for t in trained)]
    how: dict[str, Any] = dict(seed=section.seed, mesh=mesh, labels=request.labels)
    if request.low_res is None:
        sampler = generate.make_cascade_sampler(cascade, section.aug_levels, **how)
    else:
        sampler = generate.make_sampler_above(
            cascade, section.aug_levels, request.low_res.images, first=request.first, **how
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
                f"--workdir={fv.workdir}: the processes found other checkpoints, labels or images"
                " when they started; run the same command again"
            )
    with contextlib.ExitStack() as stack:
        with fail_on_all_processes():
            if is_first:
                stack.enter_context(output.writer_lock("sample"))
                store.clear_failure()
                _say(trained, store)
        generate.fill_together(
            store,
            sampler,
            params,
            labels=request.labels,
            devices=mesh.size,
            label="cascade" if request.low_res is None else "enlarging",
            name=f"--output={output.path}",
        )
        if not is_first:
            return 0
        try:
            files = _write_npz(request, store)
            picture = _picture(request, store, cascade, params, real, mesh)
            save_png(output.path / "samples.png", picture)
            if fv.png:
                _write_pngs(request, store, png_folder)
        except DamagedBatchError as e:
            raise UserError(str(e)) from e
        except OSError as e:
            raise UserError(f"--output={output.path}: cannot be written ({e.strerror or e})") from e
        store.remove()
        with contextlib.suppress(OSError):  # another cascade's are in there
            (output.path / ".batches").rmdir()
    files += ["samples.png", *(["png/"] if fv.png else [])]
    print(f"{request.title()}: in {output.path}: {', '.join(files)}", flush=True)
    return 0


def _real_images(request: Request) -> LabelledImages:
    """Those of the picture, of the split that was held out of the last stage's training."""
    from cascaded_diffusion.data.sources import spread_examples
    from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages

    folder, run = request.folders[-1], request.run_configs[-1]
    name = run.data.eval_split
    held_out = open_splits(folder, run, [name], data_path=request.data_path)[name]
    spread = spread_examples(held_out, rows=2, columns=10)
    return LabelledImages(spread["image"], spread["label"])


def _say(trained: Sequence[TrainedStage], store: SampleStore) -> None:
    """Says what is sampled, and what samples another command left unfinished."""
    for t in trained:
        print(t.name, flush=True)
    for other in store.others():
        wanted, batch_size = other.settings["num_samples"], other.settings["batch_size"]
        print(
            f"{other.folder}: {other.num_samples} of {wanted} samples ({other.num_bytes / 1e6:.1f}"
            f" MB) that were made with other settings (batches of {batch_size}); that command goes"
            " on with them; if it will not be run again, remove the folder",
            flush=True,
        )


def _write_npz(request: Request, store: SampleStore) -> list[str]:
    """The samples of every stage that was run, an `.npz` each. Returns their names."""
    from cascaded_diffusion.evaluation.samples.stored_images import save_sample_batches

    names = request.npz_names()
    for i, (name, config) in enumerate(zip(names, request.run_configs, strict=True)):
        stage = config.stage
        shape = (stage.resolution, stage.resolution, stage.channels)
        save_sample_batches(
            request.output.path / name,
            (store.num_samples, *shape),
            lambda key=f"images_{i}": ((b[key], b["labels"]) for b in store.batches()),
        )
    return names


def _write_pngs(request: Request, store: SampleStore, folder: pathlib.Path) -> None:
    """The samples of the last stage, as PNG files."""
    from cascaded_diffusion.data.given_images import output_names
    from cascaded_diffusion.runtime.pictures import save_png_folder

    names: Iterable[str] = (f"{i:06d}.png" for i in range(store.num_samples))
    if request.low_res is not None and request.low_res.names is not None:
        names = output_names(request.low_res.names)
    key = f"images_{len(request.run_configs) - 1}"
    save_png_folder(folder, names, (image for b in store.batches() for image in b[key]))


def _picture(
    request: Request,
    store: SampleStore,
    cascade: Cascade,
    params: Sequence[Any],
    real: LabelledImages | None,
    mesh: Mesh,
) -> np.ndarray:
    """What `samples.png` shows: uint8 [h, w, 3]."""
    from cascaded_diffusion.evaluation.samples import cascade_picture

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


if __name__ == "__main__":
    entry.run(main)
