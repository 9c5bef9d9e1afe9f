"""Prepares a data set once: its images at a stage's size, in shards that training reads fast.

    python -m cascaded_diffusion.prepare --config=configs/sr64.py
    python -m cascaded_diffusion.prepare --config=configs/sr64.py --dry_run

A data set that TFDS does not have yet is downloaded and prepared first, in `config.data.path`.
The shards go to `config.data.prepared_dir`. The same command resumes where it stopped, and
does nothing where all is done. `--verify` compares every shard with its SHA-256, and the
images with those that it was made of.
"""

import functools
import os
from collections.abc import Sequence

from absl import flags
from absl import logging as absl_logging

from cascaded_diffusion.commands import config_flags, entry
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.progress import Progress


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, e.g. configs/sr64.py")
    flags.DEFINE_list("splits", None, "by default train_split and eval_split", flag_values=fv)
    flags.DEFINE_integer("workers", os.cpu_count(), "processes", lower_bound=1, flag_values=fv)
    text = "of pixels: raw reads faster, png is smaller"
    flags.DEFINE_enum("encoding", "raw", ["raw", "png"], text, flag_values=fv)
    flags.DEFINE_bool("dry_run", False, "print size and time, write nothing", flag_values=fv)
    text = "compare shards, and what they were made of, with their SHA-256"
    flags.DEFINE_bool("verify", False, text, flag_values=fv)
    config_flags.parse(fv, argv, __doc__, "config")
    config = run_config_from(config_flags.config_values(fv, argv))
    if config.data.prepared_dir is None:
        raise UserError(
            "config.data.prepared_dir = None: expected the folder to write to, as"
            " --config.data.prepared_dir=prepared; and the same for training"
        )
    if fv.dry_run and fv.verify:
        raise UserError("--dry_run does not go with --verify: leave one of them out")
    absl_logging.set_verbosity(absl_logging.WARNING)

    from cascaded_diffusion.data.write_prepared import prepare_splits, verify_splits

    prepare = functools.partial(prepare_splits, encoding=fv.encoding, dry_run=fv.dry_run)
    work = verify_splits if fv.verify else prepare
    work(config.data, config.stage, fv.splits, workers=fv.workers, progress=Progress)
    return 0


if __name__ == "__main__":
    entry.end_at_once_upon_sigterm()
    entry.run(main)
