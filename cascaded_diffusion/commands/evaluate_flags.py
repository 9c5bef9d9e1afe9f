"""The flags of `evaluate`, its modes, and which flags belong to which mode."""

import itertools
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands.cluster_flags import define_cluster
from cascaded_diffusion.commands.config_flags import define_config
from cascaded_diffusion.commands.inception_flags import define_inception
from cascaded_diffusion.commands.overrides import overrides_in
from cascaded_diffusion.commands.run_images import define_data_path
from cascaded_diffusion.errors import UserError

SWEEP_FLAGS = ("aug_levels", "truncated", "samplers", "num_steps", "guidance_scales")
# Each mode and the flags that it takes besides --workdir, --data_path and those about Inception.
# Without a mode on the command line, the first one whose flag is given is meant.
MODES: dict[str, tuple[str, ...]] = {
    "sweep": ("config", "stage", *SWEEP_FLAGS, "write_best"),
    "bits_per_dim": ("num_images", "num_steps"),
    "final": ("config", "low_res_run", "low_res_samples", "num_samples"),
    "cas": ("samples", "network", "epochs"),
    "samples": ("reference", "resize", "num_samples"),
    "checkpoints": ("follow", "low_res_run", "low_res_samples"),
}


def define_evaluate(argv: Sequence[str]) -> flags.FlagValues:
    """All flags of `evaluate`."""
    fv = flags.FlagValues()
    texts = {
        "workdir": "the run folder; with sweep, or final of a cascade, the folder of runs",
        "low_res_samples": "stored samples of the stage below (.npz): score their enlargements too",
        "samples": "measure these: .npz (arr_0 uint8 NHWC) or folder of PNGs",
        "reference": "against these images or statistics, without a run",
        "bits_per_dim": "the split whose images the bound of bits_per_dim is computed over",
        "stage": "stage to sweep; default: the last",
    }
    lists = {
        "low_res_run": "run folders of the stages below, in order: score enlargements of their"
        " samples too",
        "aug_levels": "levels to try, e.g. 0,0.1,0.2",
        "truncated": "false, true or false,true",
        "samplers": "e.g. ddim,dpmpp_2m,heun,ancestral",
        "num_steps": "e.g. 4,8,16; of bits_per_dim, one number",
        "guidance_scales": "e.g. 1,1.5",
    }
    switches = {
        "follow": "keep scoring new checkpoints until training ends",
        "allow_few_samples": "allow an FID of fewer than 2,048 samples, and classes that do not"
        " have as many each",
        "write_best": "write RUN/cascade.json, the cascade with the best setting",
        **{name: f"the same as `evaluate {name}`" for name in ("final", "cas", "sweep")},
    }
    for define, default, group in (
        (flags.DEFINE_string, None, texts),
        (flags.DEFINE_list, [], lists),
        (flags.DEFINE_bool, False, switches),
    ):
        for name, text in group.items():
            define(name, default, text, flag_values=fv)
    numbers = {
        "num_samples": ("number of samples to measure", 2),
        "num_images": ("number of images of the split; default: all", 2),
        "epochs": ("of the classifier of cas, over the samples", 1),
    }
    for name, (text, least) in numbers.items():
        flags.DEFINE_integer(name, None, text, lower_bound=least, flag_values=fv)
    resize = "how images get to Inception's 299 px; default: legacy, or as the reference"
    flags.DEFINE_enum("resize", None, ["legacy", "clean", "pytorch_fid"], resize, flag_values=fv)
    network = "the classifier of cas; default: resnet50 from 64 px on"
    flags.DEFINE_enum("network", None, ["resnet", "resnet50"], network, flag_values=fv)
    define_data_path(fv)
    define_inception(fv)
    define_config(fv, argv, "with sweep or final: the cascade's config file")
    define_cluster(fv)
    return fv


def split_mode(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The mode that stands before the flags, if one does, and the arguments without it.

    Raises UserError if the first argument is neither a mode nor a flag.
    """
    if len(argv) < 2 or argv[1].startswith("-"):
        return None, list(argv)
    if argv[1] not in MODES:
        raise UserError(f"{argv[1]!r}: expected a flag, or one of {', '.join(sorted(MODES))}")
    return argv[1], [argv[0], *argv[2:]]


def check_mode(fv: flags.FlagValues, argv: Sequence[str], mode: str | None) -> str:
    """The mode: the one given, else implied by the flags. UserError if a flag is not its own."""
    known = {*MODES, *itertools.chain(*MODES.values())}
    given = {name for name in known.intersection(fv) if fv[name].value not in (None, False, [])}
    what = "--workdir alone" if mode is None and given.isdisjoint(MODES) else None
    mode = mode or next((name for name in MODES if name in given), "checkpoints")
    overridden = overrides_in(argv)
    if overridden and "config" not in MODES[mode]:
        raise UserError(
            f"{overridden[0]}: only for `evaluate sweep` and `evaluate final` of a cascade; a run"
            " is scored by its own config, which a call of `main` with this override changes where"
            " that is allowed"
        )
    if strange := sorted(given - {mode, *MODES[mode]}):
        users = ", ".join(f"`evaluate {m}`" for m in MODES if strange[0] in MODES[m])
        raise UserError(
            f"--{strange[0]} does not go with {what or f'`evaluate {mode}`'}"
            + (f"; it is for {users}" if users else "")
            + ": leave one of them out"
        )
    return mode
