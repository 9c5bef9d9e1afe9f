"""Which values of a run's config may change when the run is resumed."""

import dataclasses

from cascaded_diffusion.config.convert import flattened
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError

# The keys that may change when a run is resumed. All others decide what is computed, so another
# value is another run.
_FREE_TO_CHANGE = (
    "train.train_steps",
    "train.log_every_steps",
    "train.sample_every_steps",
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


def check_resume(old: RunConfig, new: RunConfig, workdir: str) -> list[str]:
    """One line for every key that changed, and may, since the run in a folder was started.

    Raises UserError if a key changed that decides what the run computes.
    """
    old_flat, new_flat = flattened(dataclasses.asdict(old)), flattened(dataclasses.asdict(new))
    changed = [key for key in new_flat if old_flat.get(key) != new_flat[key]]
    for key in changed:
        if not key.startswith(_FREE_TO_CHANGE):
            raise UserError(
                f"config.{key} = {new_flat[key]!r}: the run in {workdir} was started with"
                f" {old_flat.get(key)!r}; set it back, or choose another --workdir"
            )
    return [f"config.{key}: {old_flat.get(key)!r} -> {new_flat[key]!r}" for key in changed]
