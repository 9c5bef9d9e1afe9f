"""Scores a run's checkpoints and picks the best; measures samples; searches after training.

    python -m cascaded_diffusion.evaluate --workdir=RUN/base16 [--follow]
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --low_res_run=RUN/base16
    python -m cascaded_diffusion.evaluate --workdir=RUN/base16 --final
    python -m cascaded_diffusion.evaluate --workdir=RUN --config=configs/mnist_cascade32.py --final
    python -m cascaded_diffusion.evaluate --samples=A.npz --reference=B.npz --inception_weights=W
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --samples=RUN/samples/samples.npz
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --samples=A.npz --cas
    python -m cascaded_diffusion.evaluate --workdir=RUN/base16 --bits_per_dim=test
    python -m cascaded_diffusion.evaluate --sweep --workdir=RUN --config=configs/mnist_cascade32.py
        --aug_levels=0,0.1,0.2,0.3 --truncated=false,true --write_best

A process of its own, beside the trainer or after it. With a run folder alone it scores
every checkpoint that has no score, by the few-step sampler and the number of samples of
the run's config, and writes RUN/eval/results.jsonl, RUN/eval/best.json, sample grids,
curves for TensorBoard, and RUN/EARLY_STOP when scores have stopped to improve; --follow
goes on until training ends. What is scored already is not scored again. Killed at any
time, the same command goes on where it was.

--final measures the chosen checkpoint, or a whole cascade, on as many samples as the
config says, against the training and the validation images.

Without --workdir, --samples is any .npz or folder of PNGs, of any framework, and
--reference another, or statistics as `python -m cascaded_diffusion.reference` or ADM
make them: one JSON line is printed.

--cas trains a classifier on the samples alone and tests it on real images, beside the
same classifier trained on real images.

--sweep scores one stage of a trained cascade in every combination of --aug_levels,
--truncated, --samplers, --num_steps and --guidance_scales, and writes a table and a
plot below RUN/sweep. --write_best then writes RUN/cascade.json, the cascade with the
best of them, which `sample --workdir=RUN` and the next --sweep use without --config.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import (
    cluster_flags,
    config_flags,
    entry,
    flag_checks,
    inception_flags,
    overrides,
)
from cascaded_diffusion.commands.evaluate_bound import evaluate_bound
from cascaded_diffusion.commands.evaluate_files import evaluate_files
from cascaded_diffusion.commands.evaluate_final import evaluate_final
from cascaded_diffusion.commands.evaluate_run import evaluate_checkpoints
from cascaded_diffusion.commands.evaluate_samples import evaluate_cas, evaluate_samples
from cascaded_diffusion.commands.evaluate_sweep import SWEEP_FLAGS, evaluate_sweep
from cascaded_diffusion.commands.run_images import define_data_path
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunFolder

# The modes, by the flag that asks for each, and the flags that each takes besides
# --workdir, --data_path and where Inception's weights are.
_MODES: dict[str, tuple[str, ...]] = {
    "sweep": ("config", *SWEEP_FLAGS, "write_best"),
    "bits_per_dim": ("num_images", "num_steps"),
    "final": ("config", "low_res_run", "low_res_samples", "num_samples"),
    "cas": ("samples", "network", "epochs"),
    "samples": ("reference", "resize", "num_samples"),
    "": ("follow", "low_res_run", "low_res_samples"),
}


def _define_flags(argv: Sequence[str]) -> flags.FlagValues:
    fv = flags.FlagValues()
    flags.DEFINE_string(
        "workdir",
        None,
        "the run folder to score; with --sweep, or --final of a cascade, the folder of runs",
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "follow", False, "keep scoring new checkpoints until training ends", flag_values=fv
    )
    flags.DEFINE_list(
        "low_res_run",
        [],
        "run folders of the stages below, in order: score enlargements of their samples too",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "low_res_samples",
        None,
        "stored samples of the stage below (.npz): score their enlargements too",
        flag_values=fv,
    )
    flags.DEFINE_bool("final", False, "the final numbers of the chosen checkpoint", flag_values=fv)
    flags.DEFINE_string(
        "samples", None, "measure these: .npz (arr_0 uint8 NHWC) or folder of PNGs", flag_values=fv
    )
    flags.DEFINE_string(
        "reference", None, "against these images or statistics, without a run", flag_values=fv
    )
    flags.DEFINE_enum(
        "resize", None, ["legacy", "clean"], "to Inception's 299 px; legacy", flag_values=fv
    )
    flags.DEFINE_integer(
        "num_samples", None, "how many samples to measure", lower_bound=2, flag_values=fv
    )
    flags.DEFINE_bool(
        "allow_few_samples", False, "an FID of fewer than 2,048 samples", flag_values=fv
    )
    define_data_path(fv)
    inception_flags.define_inception(fv)
    flags.DEFINE_bool("cas", False, "classification accuracy score of --samples", flag_values=fv)
    flags.DEFINE_enum(
        "network",
        None,
        ["resnet", "resnet50"],
        "of --cas; default: resnet50 from 64 px on",
        flag_values=fv,
    )
    flags.DEFINE_integer("epochs", None, "of --cas, over the samples", 1, flag_values=fv)
    flags.DEFINE_string(
        "bits_per_dim",
        None,
        "a split: the chosen checkpoint's variational bound over its images, in --num_steps",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "num_images", None, "of that split; default: all of it", lower_bound=2, flag_values=fv
    )
    flags.DEFINE_bool("sweep", False, "search a trained cascade's settings", flag_values=fv)
    config_flags.define_config(fv, argv, "with --sweep or --final: the cascade's config file")
    flags.DEFINE_string("stage", None, "stage to sweep; default: the last", flag_values=fv)
    flags.DEFINE_list("aug_levels", [], "levels to try, e.g. 0,0.1,0.2", flag_values=fv)
    flags.DEFINE_list("truncated", [], "false, true or false,true", flag_values=fv)
    flags.DEFINE_list("samplers", [], "e.g. ddim,dpmpp_2m,heun,ancestral", flag_values=fv)
    flags.DEFINE_list("num_steps", [], "e.g. 4,8,16", flag_values=fv)
    flags.DEFINE_list("guidance_scales", [], "e.g. 1,1.5", flag_values=fv)
    flags.DEFINE_bool("write_best", False, "write RUN/cascade.json", flag_values=fv)
    cluster_flags.define_cluster(fv)
    return fv


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = _define_flags(argv)
    config_flags.parse(fv, argv, __doc__)
    flag_checks.check_paths(
        fv, "workdir", "samples", "reference", "low_res_run", "low_res_samples", "data_path",
    )  # fmt: skip
    inception_flags.check_inception(fv)
    cluster_flags.refuse_cluster(fv)
    mode = next(name for name in _MODES if not name or fv[name].value not in (None, False))
    _check_flags(fv, argv, mode)
    if mode == "samples" and fv.workdir is None:
        if fv.data_path is not None:
            raise UserError("--data_path: only with --workdir, for the images of a run")
        return evaluate_files(fv)
    if fv.reference is not None or fv.resize is not None:
        raise UserError(
            "--reference, --resize: only without --workdir, which has its own; leave one out"
        )
    flag_checks.require(fv, "workdir")
    if mode == "sweep":
        return evaluate_sweep(fv, argv)
    if mode == "final":
        return evaluate_final(fv, argv)
    folder = RunFolder(fv.workdir)
    config = folder.read_config()
    folder.check_writable()
    if mode == "bits_per_dim":
        return evaluate_bound(fv, folder, config)
    if mode == "cas":
        flag_checks.require(fv, "samples")
        return evaluate_cas(fv, folder, config)
    if mode == "samples":
        return evaluate_samples(fv, folder, config)
    return evaluate_checkpoints(fv, folder, config)


def _check_flags(fv: flags.FlagValues, argv: Sequence[str], mode: str) -> None:
    """Raises UserError for a flag that means nothing in this mode."""
    overridden = overrides.overrides_in(argv)
    if overridden and "config" not in _MODES[mode]:
        raise UserError(
            f"{overridden[0]}: only for --sweep and --final of a cascade; a run is scored by its"
            " own config, which a call of `main` with this override changes where that is allowed"
        )
    for name in sorted({*_MODES, *(flag for taken in _MODES.values() for flag in taken)} - {""}):
        given = fv[name].value not in (None, False, [])
        if given and name != mode and name not in _MODES[mode]:
            users = [f"--{m}" if m else "scoring checkpoints" for m in _MODES if name in _MODES[m]]
            what = f"--{mode}" if mode else "--workdir alone"
            raise UserError(
                f"--{name} does not go with {what}"
                + (f"; it is for {', '.join(users)}" if users else "")
                + ": leave one of them out"
            )


if __name__ == "__main__":
    entry.run(main)
