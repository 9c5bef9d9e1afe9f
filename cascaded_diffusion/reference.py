"""Makes reference statistics: what an FID is measured against.

    python -m cascaded_diffusion.reference --config=configs/sr64.py --workdir=RUN/sr64
    python -m cascaded_diffusion.reference --workdir=RUN/base16
    python -m cascaded_diffusion.reference --images=FOLDER_OR_NPZ --output=REF.npz --resize=clean

For a run: the statistics of its training and of its validation images (--roles) at the
run's resolution, by the extractor that its config names, as RUN/eval/reference_train.npz
and reference_val.npz; `evaluate` makes those that it does not find, this command makes
them before, on any machine that has the data. For images: by Inception.

The file says exactly what it is of: data set, split, count, crop, resolution, resizing,
extractor. `evaluate` refuses a reference of which one field is not what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import (
    config_flags,
    entry,
    flag_checks,
    inception_flags,
    jax_setup,
    overrides,
)
from cascaded_diffusion.commands.evaluate_run import build_run_evaluator
from cascaded_diffusion.config.run_checks import evaluation_mesh, run_config_from
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import batches, open_images
from cascaded_diffusion.files.folders import check_writable
from cascaded_diffusion.runtime.run_folder import RunFolder

_BATCH = 500


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, where there is no run yet")
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    flags.DEFINE_list("roles", ["train", "val"], "which splits of a run", flag_values=fv)
    flags.DEFINE_string("images", None, "an .npz or a folder of PNGs", flag_values=fv)
    flags.DEFINE_string("output", None, "with --images: the .npz to write", flag_values=fv)
    flags.DEFINE_enum(
        "resize", None, ["legacy", "clean"], "with --images: to 299 px; legacy", flag_values=fv
    )
    inception_flags.define_inception(fv)
    config_flags.parse(fv, argv, __doc__)
    flag_checks.check_paths(fv, "workdir", "images", "output")
    inception_flags.check_inception(fv)
    if fv.images is not None:
        for name in ("workdir", "config"):
            if fv[name].value is not None:
                raise UserError(f"--images does not go with --{name}: leave one of them out")
        overrides.refuse_overrides(argv, "means nothing for --images")
        return _of_images(fv)
    for name in ("output", "resize"):
        if fv[name].value is not None:
            raise UserError(f"--{name} is only for --images: a run's config says it")
    flag_checks.require(fv, "workdir")
    return _of_run(fv, argv)


def _of_run(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    if not fv.roles or not set(fv.roles) <= {"train", "val"}:
        raise UserError(f"--roles={','.join(fv.roles)}: expected train, val, or train,val")
    folder = RunFolder(fv.workdir)
    if folder.exists():
        if fv.config is not None:
            raise UserError(
                f"--config: the run in {fv.workdir} has its own config.json; leave it out"
            )
        overrides.refuse_overrides(argv, f"the run in {fv.workdir} has its own config.json")
        config = folder.read_config()
    else:
        if fv.config is None:
            folder.read_config()  # says that there is none
        config = run_config_from(config_flags.config_values(fv, argv))
    folder.check_writable()
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.runtime.mesh import build_mesh

    mesh = build_mesh(evaluation_mesh(config, jax.device_count()))
    with folder.writer_lock("eval"):
        evaluator = build_run_evaluator(fv, config, folder, mesh, fv.roles)
    for role, reference in evaluator.references.items():
        print(
            f"{folder.eval}/reference_{role}.npz: {reference.name}, {evaluator.features}",
            flush=True,
        )
    return 0


def _of_images(fv: flags.FlagValues) -> int:
    flag_checks.require(fv, "output")
    output = RunFolder(fv.output, flag="output").path
    if output.suffix != ".npz" or output.is_dir():
        raise UserError(f"--output={fv.output}: expected a name that ends with .npz, of a file")
    check_writable(output.parent, "output")
    images = open_images(fv.images, flag="images")
    jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation.reference import measure_reference, save_reference
    from cascaded_diffusion.runtime.mesh import build_mesh

    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    extractor = inception_flags.inception_loader(fv, mesh)(fv.resize or "legacy")
    reference = measure_reference(
        batches(images.images, _BATCH),
        extractor,
        num_images=len(images),
        label="reference",
        data=f"file:{fv.images}",
        split="",
        crop="none",
        resize="none",
    )
    save_reference(output, reference)
    print(f"{output}: {reference.name}, {extractor.identity}", flush=True)
    return 0


if __name__ == "__main__":
    entry.run(main)
