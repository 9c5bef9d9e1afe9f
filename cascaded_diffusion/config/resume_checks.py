"""Which values of a run's config may change when the run is resumed."""

import dataclasses
from collections.abc import Collection

from cascaded_diffusion.config.convert import flattened
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError

# The keys that may change when a run is resumed. All others decide what is computed, so another
# value is another run.
_FREE_TO_CHANGE = (
    "train.train_steps",
    "train.log_every_steps",
    "train.sample_every_steps",
    "train.hang_secs",
    "train.max_nonfinite_in_row",
    "train.max_nonfinite_per_thousand",
    # How it is computed, not what.
    "train.accumulation_steps",
    "train.remat",
    # Where the images are and how they are read; runtime.run_data checks that they are the same.
    "data.path",
    "data.prepared_dir",
    "data.on_corrupt",
    "data.max_corrupt_fraction",
    "data.max_pixels",
    "data.read_threads",
    "data.read_workers",
    "eval.",
    "mesh.",
    "checkpoint.",
    "stage.sampler.",
)


def check_resume(
    old: RunConfig, new: RunConfig, workdir: str, *, allowed: Collection[str] = ()
) -> list[str]:
    """One line for every key that changed, and may, since the run in a folder was started.

    `allowed` are further keys that may change, or the beginnings of some ("stage.diffusion."),
    without "config.". Raises UserError if another key changed that decides what the run computes,
    or one that is allowed is no key of a config.
    """
    old_flat, new_flat = flattened(dataclasses.asdict(old)), flattened(dataclasses.asdict(new))
    for name in allowed:
        if not any(_is_within(key, name) for key in (*old_flat, *new_flat)):
            raise UserError(f"--allow_changed={name}: expected config keys, as train.batch_size")
    changed = [key for key in {**old_flat, **new_flat} if old_flat.get(key) != new_flat.get(key)]
    for key in changed:
        free = key.startswith(_FREE_TO_CHANGE)
        if key == "data.max_pixels" and "skip" in (old.data.on_corrupt, new.data.on_corrupt):
            free = False  # it says which images are left out
        if not free and not any(_is_within(key, name) for name in allowed):
            raise UserError(
                f"config.{key} = {new_flat.get(key)!r}: the run in {workdir} was started with"
                f" {old_flat.get(key)!r}; set it back, choose another --workdir, or change what is"
                f" trained from here on by --allow_changed={key}"
            )
    return [f"config.{key}: {old_flat.get(key)!r} -> {new_flat.get(key)!r}" for key in changed]


def _is_within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name.rstrip('.')}.")
