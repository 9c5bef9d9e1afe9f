"""Scores a run's checkpoints and picks the best; measures samples; searches after training.

    python -m cascaded_diffusion.evaluate --workdir=RUN/base16 [--follow]
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --low_res_run=RUN/base16
    python -m cascaded_diffusion.evaluate final --workdir=RUN/base16
    python -m cascaded_diffusion.evaluate final --workdir=RUN --config=configs/mnist_cascade32.py
    python -m cascaded_diffusion.evaluate samples --samples=A.npz --reference=B.npz
    python -m cascaded_diffusion.evaluate samples --samples=A.npz --workdir=RUN/sr32
    python -m cascaded_diffusion.evaluate cas --samples=A.npz --workdir=RUN/sr32
    python -m cascaded_diffusion.evaluate bits_per_dim --bits_per_dim=test --workdir=RUN/base16
    python -m cascaded_diffusion.evaluate sweep --workdir=RUN --config=configs/mnist_cascade32.py
        --aug_levels=0,0.1,0.2,0.3 --truncated=false,true --write_best

It runs beside the trainer or after it. Killed at any time, the same command resumes where it
stopped. Several processes, started as for `main`, may score checkpoints, measure final numbers and
sweep: they divide the samples, and the numbers are the same. The modes, which `--final`, `--cas`,
`--sweep`, `--samples` and `--bits_per_dim` select without the mode's name, too:

checkpoints (the default) scores every checkpoint of a run that has no score yet, with the
few-step sampler and the number of samples of the run's config. It writes RUN/eval/results.jsonl,
RUN/eval/best.json, sample grids, curves for TensorBoard, and RUN/EARLY_STOP once the scores have
stopped improving. --follow continues until training ends.

final measures the chosen checkpoint, or a whole cascade, on as many samples as the config says,
against the training and the validation images.

samples measures stored samples as the run in --workdir is measured. Without --workdir they may be
of any framework: an .npz or a folder of PNGs, compared by Inception with --reference, which is
another or a file of statistics from `python -m cascaded_diffusion.reference` or ADM. It prints
one JSON line.

cas trains a classifier on the samples alone and tests it on real images, beside the same
classifier trained on real images.

bits_per_dim computes the variational bound of the chosen checkpoint over a split's images.

sweep scores one stage of a trained cascade in every combination of --aug_levels, --truncated,
--samplers, --num_steps and --guidance_scales, and writes a table and a plot below RUN/sweep.
--write_best then writes RUN/cascade.json, the cascade with the best setting, which
`sample --workdir=RUN` and the next sweep use without --config.
"""

from collections.abc import Sequence

from cascaded_diffusion.commands import config_flags, entry
from cascaded_diffusion.commands.cluster_flags import refuse_cluster
from cascaded_diffusion.commands.evaluate_flags import check_mode, define_evaluate, split_mode
from cascaded_diffusion.commands.evaluate_modes import run_mode
from cascaded_diffusion.commands.flag_checks import check_paths
from cascaded_diffusion.commands.inception_flags import check_inception


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    mode, argv = split_mode(argv)
    fv = define_evaluate(argv)
    config_flags.parse(fv, argv, __doc__)
    paths = ("workdir", "samples", "reference", "low_res_run", "low_res_samples", "data_path")
    check_paths(fv, *paths)
    check_inception(fv)
    mode = check_mode(fv, argv, mode)
    if mode not in ("checkpoints", "final", "sweep"):
        refuse_cluster(fv, mode)
    return run_mode(fv, argv, mode)


if __name__ == "__main__":
    entry.end_at_once_upon_sigterm()
    entry.run(main)
