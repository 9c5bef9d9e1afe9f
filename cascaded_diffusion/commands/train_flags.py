"""The flags of `main`."""

import re

from absl import flags

from cascaded_diffusion.commands import cluster_flags, run_images
from cascaded_diffusion.errors import UserError


def define(fv: flags.FlagValues) -> None:
    """Adds the flags of `main` besides --config."""
    text = "folder of the run, made if missing; default: RUN/<name of the stage>"
    flags.DEFINE_string("workdir", None, text, flag_values=fv)
    text = "FIRST:LAST, the steps to write a trace of"
    flags.DEFINE_string("profile_steps", None, text, flag_values=fv)
    text = "RUN/nonfinite/STEP: do that step again, and say what is not finite in it"
    flags.DEFINE_string("replay", None, text, flag_values=fv)
    text = "begin at step 0 where a run is in --workdir but none of its checkpoints is intact"
    flags.DEFINE_bool("start_over", False, text, flag_values=fv)
    text = "config keys that may change what a run trains from here on, as train.batch_size"
    flags.DEFINE_list("allow_changed", [], text, flag_values=fv)
    run_images.define_data_path(fv)
    cluster_flags.define_cluster(fv)


def allowed_keys(fv: flags.FlagValues) -> list[str]:
    """The keys of `--allow_changed`, with or without "config." before them."""
    return [key.strip().removeprefix("config.") for key in fv.allow_changed]


def profile_steps(text: str | None, train_steps: int) -> tuple[int, int] | None:
    """The steps of `--profile_steps`, first and last. Raises UserError if they are none."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= train_steps:
        raise UserError(
            f"--profile_steps={text}: expected FIRST:LAST, as 100:105, steps from 1 to"
            f" config.train.train_steps = {train_steps}"
        )
    return int(found[1]), int(found[2])
