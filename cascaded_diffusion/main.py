"""Trains one stage.

    python -m cascaded_diffusion.main --config=configs/mnist_base16.py --workdir=RUN/base16

The same command run again goes on where the run stopped. Exit codes: 0 finished
(or stopped early, as evaluation asked), 2 bad input, 75 stopped by SIGTERM or
SIGINT after saving.

On several hosts every process runs the same command. On Slurm (srun) and in GKE they find
each other, on a Cloud TPU with --distributed=tpu, elsewhere with --coordinator=HOST:PORT
--num_processes=N --process_id=I. --workdir is one folder that all of them see.

A run goes on with the images that it began with. If they were moved, copied or touched, say
where they lie with --data_path=FOLDER. A run whose checkpoints are lost is begun again only
with --start_over.

--profile_steps=100:105 writes a trace of these steps to WORKDIR/profile.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion import cli, run_images
from cascaded_diffusion.config_checks import check_devices, check_resume, run_config_from
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunData, RunFolder


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    cli.define_config(fv, argv, "the stage's config file, e.g. configs/mnist_base16.py")
    flags.DEFINE_string("workdir", None, "folder of the run; made if missing", flag_values=fv)
    flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST step to write a trace of", flag_values=fv
    )
    flags.DEFINE_bool(
        "start_over",
        False,
        "begin at step 0 where a run is in --workdir but none of its checkpoints is intact",
        flag_values=fv,
    )
    run_images.define_data_path(fv)
    cli.define_cluster(fv)
    cli.parse(fv, argv, __doc__)
    cli.require(fv, "config", "workdir")
    as_given = run_config_from(cli.config_values(fv, argv))
    config = run_images.with_absolute_paths(as_given, fv.data_path)
    profile_steps = _profile_steps(fv.profile_steps)
    folder = RunFolder(fv.workdir)
    folder.check_writable()
    if folder.exists():
        check_resume(folder.read_config(), config, fv.workdir)

    cluster = cli.join_cluster(fv, config, "workdir")
    jax = cli.set_up_jax(cluster)
    from cascaded_diffusion.data.loader import build_stream, iterate
    from cascaded_diffusion.data.sources import load_splits, spread_examples
    from cascaded_diffusion.runtime.mesh import batch_share, build_mesh, together
    from cascaded_diffusion.training.grid import GRID_COLUMNS, GRID_ROWS
    from cascaded_diffusion.training.loop import train

    check_devices(config, jax.device_count())
    index, count = batch_share(build_mesh(config.mesh))
    with together():
        names = [config.data.train_split, config.data.eval_split]
        sources = load_splits(config.data, list(dict.fromkeys(names)), config.stage)
        source, held_out = (sources[name] for name in names)
        stream = build_stream(
            source,
            config.data,
            global_batch_size=config.train.batch_size,
            process_index=index,
            process_count=count,
        )
        grid_examples = spread_examples(held_out, rows=GRID_ROWS, columns=GRID_COLUMNS)
    outcome = train(
        config,
        folder,
        lambda start_step: iterate(stream, source, config.data, start_step=start_step),
        image_shape=source.image_shape,
        low_res_shape=source.low_res_shape,
        data=RunData(
            splits=sources,
            path=config.data.path,
            path_as_given=fv.data_path or as_given.data.path,
            given_anew=fv.data_path is not None,
        ),
        start_over=fv.start_over,
        grid_examples=grid_examples,
        profile_steps=profile_steps,
    )
    if jax.process_index() > 0:  # one of them speaks for all
        return cli.EXIT_PREEMPTED if outcome.reason == "preempted" else 0
    name = config.stage.name
    if outcome.reason == "preempted":
        print(f"{name}: stopped by a signal at step {outcome.step}, saved; run it again to go on")
        return cli.EXIT_PREEMPTED
    if outcome.reason == "early_stop":
        print(
            f"{name}: stopped early at step {outcome.step}, as {folder.early_stop_path} asks; to go"
            f" on all the same, {folder.how_to_go_on()}"
        )
    else:
        print(f"{name}: finished, {outcome.step} steps ({folder.path})")
    return 0


def _profile_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile_steps={text}: expected FIRST:LAST, steps from 1 on, as 100:105")
    return int(first), int(last)


if __name__ == "__main__":
    cli.run(main)
