"""Trains one stage.

    python -m cascaded_diffusion.main --config=configs/mnist_base16.py --workdir=RUN/base16

Without --workdir the run goes to RUN/<name of the stage>.

The same command run again resumes the run. Exit codes: 0 finished (or stopped early, as
evaluation asked), 2 bad input, 75 stopped by SIGTERM or SIGINT after saving, by SIGTERM before the
first step, or because another process of the job was lost or no step has finished for long: run it
again.

On several hosts every process runs the same command. On Slurm (srun) and in GKE the processes
find each other, on a Cloud TPU with --distributed=tpu, elsewhere with
--coordinator=HOST:PORT --num_processes=N --process_id=I. All of them must see the same --workdir.

A run is resumed only with the images that it began with. If they were moved, copied or touched,
say where they are now with --data_path=FOLDER. A run whose checkpoints are lost begins again
only with --start_over. A config key that decides what is trained may change only where
--allow_changed names it, as --allow_changed=train.learning_rate,train.batch_size.

--profile_steps=100:105 writes a trace of these steps to WORKDIR/profile.

A step whose loss or gradient is not finite changes nothing, and is a line of
WORKDIR/nonfinite.jsonl. Training ends if they are too many. --replay=WORKDIR/nonfinite/STEP, given
alone, does the last one again and names the gradients and the records that are not finite.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import (
    cluster_flags,
    config_flags,
    entry,
    flag_checks,
    jax_setup,
    run_images,
    train_flags,
)
from cascaded_diffusion.commands.overrides import overrides_in
from cascaded_diffusion.config.resume_checks import check_resume
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.errors import EXIT_TRY_AGAIN, UserError
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.runtime.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, e.g. configs/mnist_base16.py")
    train_flags.define(fv)
    config_flags.parse(fv, argv, __doc__)
    if fv.replay is not None:
        return _replay(fv, argv)
    flag_checks.require(fv, "config")
    config, notes = run_config_from(config_flags.config_values(fv, argv)), []
    if fv.workdir is None:
        fv.workdir = str(pathlib.Path("RUN") / config.stage.name)
        notes.append(f"--workdir was not given: the run goes to {fv.workdir}")
    flag_checks.check_paths(fv, "workdir", "data_path")
    allowed = train_flags.allowed_keys(fv)
    profile_steps = train_flags.profile_steps(fv.profile_steps, config.train.train_steps)
    resolved = run_images.with_absolute_paths(config, fv.data_path)
    folder = RunFolder(fv.workdir)
    folder.check_writable()
    if folder.exists():
        check_resume(folder.read_config(), resolved, fv.workdir, allowed=allowed)

    jax_setup.set_up_jax(cluster_flags.join_cluster(fv, resolved, "workdir"))
    from cascaded_diffusion.commands.train_stage import print_outcome, train_stage

    outcome = train_stage(
        config,
        folder,
        data_path=fv.data_path,
        start_over=fv.start_over,
        allow_changed=allowed,
        profile_steps=profile_steps,
        notes=notes,
    )
    print_outcome(outcome, config, folder)
    return EXIT_TRY_AGAIN if outcome.reason == "preempted" else 0


def _replay(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    if fv.config is not None or overrides_in(argv):
        raise UserError("--replay: expected no --config, since the run has its own")
    flag_checks.check_paths(fv, "replay", "data_path")
    jax_setup.set_up_jax()
    from cascaded_diffusion.commands.replay_step import replay_step

    return replay_step(path_of(fv.replay), fv.data_path)


if __name__ == "__main__":
    entry.end_at_once_before_training()
    entry.run(main)
