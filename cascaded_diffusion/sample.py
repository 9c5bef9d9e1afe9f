"""Samples a cascade of trained stages, at the checkpoints that evaluation chose.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade32.py --workdir=RUN

samples the runs RUN/<stage> that the config names. Without --config it samples the cascade that
`evaluate sweep --write_best` wrote to RUN/cascade.json. It writes below --output:

    samples.npz   arr_0 uint8 [n, H, W, C], arr_1 int64 labels [n] (ADM style)
    <stage>.npz   the same for every earlier stage (if truncated, still noisy and cut)
    samples.png   per class: real, low-res, enlarged real, base and cascade images
    classes.png   the first samples of every class, a row per class
    png/          with --png: every image of samples.npz as a file
    samples.json  these files, and how they were made: seed, samplers, levels, checkpoints

These flags choose the classes and the number of samples of each. With them --output is
RUN/chosen_classes by default, without them RUN/samples:

    --labels=3,7        only these, in turn: numbers, or names of the data's classes
    --labels=FILE       .txt (one per line), .npz or .npy: one for each sample, or in turn
    --per_class=8       this many of every class, or of each of --labels

This enlarges images of your own; --output is then RUN/enlarged by default:

    --low_res=FOLDER --labels=3,7 --png

FOLDER may also be a single image or an .npz (arr_0, and arr_1 as labels). The images' size
determines the first stage; --resize_low_res=16 cuts out centre squares and shrinks them.
cat.jpg becomes png/cat.png. The given images are noised to the aug_level of the first stage, even
in a truncated cascade. --workdir may also be the run of a single super-resolution stage, which is
sampled with the sampler of its config at the level `eval.aug_level`;
--config.cascade.aug_levels=(0.2,) or --config.cascade.samplers.1.num_steps=20 override them.

Sample i depends only on (seed, i), its label and its low-res image. With another batch size or
number of devices or hosts it is the same up to float rounding: a grey level or two in a few
pixels.

Samples are kept batch by batch while they are made: the same command run again makes only the
missing batches, on any number of hosts. Several processes, started as for `main`, divide the
batches among them; --output is one folder that all of them see.
"""

from collections.abc import Sequence
from functools import partial

from absl import flags

import cascaded_diffusion as library
from cascaded_diffusion.commands import entry, jax_setup
from cascaded_diffusion.commands.cluster_flags import define_cluster, join_cluster
from cascaded_diffusion.commands.config_flags import define_config, parse
from cascaded_diffusion.commands.run_images import shown_images
from cascaded_diffusion.commands.sample_inputs import define_inputs, read_request


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    define_config(fv, argv, "the cascade's config file, e.g. configs/mnist_cascade32.py")
    define_inputs(fv)
    define_cluster(fv)
    parse(fv, argv, __doc__, "workdir")
    request = read_request(fv, argv)
    cluster = join_cluster(fv, request.config, "workdir", "output")
    jax_setup.set_up_jax(cluster)
    real = None
    if request.low_res is None and not request.chosen:
        real = partial(shown_images, request.folders[-1], data_path=fv.data_path)
    library.sample_cascade(request, real=real)
    return 0


if __name__ == "__main__":
    entry.end_at_once_upon_sigterm()
    entry.run(main)
