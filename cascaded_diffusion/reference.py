"""Makes reference statistics: what an FID is measured against.

    python -m cascaded_diffusion.reference --config=configs/sr64.py --workdir=RUN/sr64
    python -m cascaded_diffusion.reference --workdir=RUN/base16
    python -m cascaded_diffusion.reference --images=FOLDER_OR_NPZ --output=REF.npz --resize=clean

For a run, these are the statistics of its training and validation images (--roles) at the run's
resolution, by the extractor that its config names: RUN/eval/reference_train.npz and
reference_val.npz. `evaluate` makes those that it does not find; this command makes them
beforehand, on any machine that has the data. For images, they are made by Inception.

The file says exactly what it was made from: data set, split, count, crop, resolution, resizing
and extractor. `evaluate` refuses a reference if any of these is not what it needs.
"""

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, entry, overrides
from cascaded_diffusion.commands.flag_checks import check_paths, require
from cascaded_diffusion.commands.inception_flags import check_inception, define_inception
from cascaded_diffusion.commands.make_references import reference_of_images, references_of_run
from cascaded_diffusion.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, where there is no run yet")
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    flags.DEFINE_list("roles", ["train", "val"], "which splits of a run", flag_values=fv)
    flags.DEFINE_string("images", None, "an .npz or a folder of PNGs", flag_values=fv)
    flags.DEFINE_string("output", None, "with --images: the .npz to write", flag_values=fv)
    resize = "with --images: to 299 px; legacy"
    flags.DEFINE_enum("resize", None, ["legacy", "clean", "pytorch_fid"], resize, flag_values=fv)
    define_inception(fv)
    config_flags.parse(fv, argv, __doc__)
    check_paths(fv, "workdir", "images", "output")
    check_inception(fv)
    if fv.images is not None:
        for name in ("workdir", "config"):
            if fv[name].value is not None:
                raise UserError(f"--images does not go with --{name}: leave one of them out")
        overrides.refuse_overrides(argv, "means nothing for --images")
        reference_of_images(fv)
    else:
        for name in ("output", "resize"):
            if fv[name].value is not None:
                raise UserError(f"--{name} is only for --images: a run's config says it")
        require(fv, "workdir")
        references_of_run(fv, argv)
    return 0


if __name__ == "__main__":
    entry.run(main)
