"""Shows what a model will see of its data, and how fast it comes.

    python -m cascaded_diffusion.data --config=configs/sr64.py --show
    python -m cascaded_diffusion.data --config=configs/sr64.py --show --split=validation

Writes a picture, by default data.png: the images of the first batches as the model trains on them,
and below each what a super-resolution stage gets: its low-res input, clean and damaged by
conditioning augmentation at several strengths. Prints counts per class, and images/s with
where the time goes.
"""

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, flag_checks, jax_setup
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.files.paths import check_writable


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, e.g. configs/sr64.py")
    flags.DEFINE_bool("show", False, "write the picture and print what is there", flag_values=fv)
    flags.DEFINE_string("split", None, "which split; train_split of the config", flag_values=fv)
    flags.DEFINE_string("output", "data.png", "the picture to write", flag_values=fv)
    bounds = dict(lower_bound=1, upper_bound=64)
    flags.DEFINE_integer("images", 8, "how many in the picture", flag_values=fv, **bounds)
    bounds = dict(lower_bound=0.1, upper_bound=3600.0)
    flags.DEFINE_float("secs", 10.0, "how long to measure the loader", flag_values=fv, **bounds)
    config_flags.parse(fv, argv, __doc__, "config")
    if not fv.show:
        raise UserError("nothing to do: add --show")
    config = run_config_from(config_flags.config_values(fv, argv))
    flag_checks.check_paths(fv, "output")
    output = path_of(fv.output)
    if output.suffix != ".png":
        raise UserError(f"--output={fv.output}: expected a name that ends with .png")
    check_writable(output.absolute().parent, "output")
    jax_setup.set_up_jax()

    from cascaded_diffusion.commands.data_report import report_data

    split = fv.split or config.data.train_split
    report_data(config, split, picture=output, num_images=fv.images, loader_secs=fv.secs)
    return 0
