"""Trains one stage.

    python -m cascaded_diffusion.main --config=configs/mnist_base16.py --workdir=RUN/base16

The same command run again goes on where the run stopped. Exit codes: 0 finished
(or stopped early, as evaluation asked), 2 bad input, 75 stopped by SIGTERM or
SIGINT after saving.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config_checks import check_devices, check_resume, run_config_from
from cascaded_diffusion.runtime.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    cli.define_config(fv, argv, "the stage's config file, e.g. configs/mnist_base16.py")
    flags.DEFINE_string("workdir", None, "folder of the run; made if missing", flag_values=fv)
    cli.parse(fv, argv, __doc__)
    cli.require(fv, "config", "workdir")
    config = run_config_from(cli.config_values(fv, argv))
    folder = RunFolder(fv.workdir)
    folder.check_writable()
    if folder.exists():
        check_resume(folder.read_config(), config, fv.workdir)

    jax = cli.set_up_jax()
    from cascaded_diffusion.data.loader import build_stream, iterate
    from cascaded_diffusion.data.sources import load_source, spread_examples
    from cascaded_diffusion.training.grid import GRID_COLUMNS, GRID_ROWS
    from cascaded_diffusion.training.loop import train

    source = load_source(config.data, config.data.train_split, config.stage)
    held_out = load_source(config.data, config.data.eval_split, config.stage)
    check_devices(config, jax.device_count())
    stream = build_stream(
        source,
        config.data,
        global_batch_size=config.train.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    outcome = train(
        config,
        folder,
        lambda start_step: iterate(stream, source, config.data, start_step=start_step),
        image_shape=source.image_shape,
        low_res_shape=source.low_res_shape,
        data_identity={
            config.data.train_split: source.identity,
            config.data.eval_split: held_out.identity,
        },
        grid_examples=spread_examples(held_out, rows=GRID_ROWS, columns=GRID_COLUMNS),
    )
    name = config.stage.name
    if outcome.reason == "preempted":
        print(f"{name}: stopped by a signal at step {outcome.step}, saved; run it again to go on")
        return cli.EXIT_PREEMPTED
    if outcome.reason == "early_stop":
        print(
            f"{name}: stopped early at step {outcome.step}, as evaluation asked; to go on all the"
            " same, run it with a larger --config.eval.patience_evals"
        )
    else:
        print(f"{name}: finished, {outcome.step} steps ({folder.path})")
    return 0


if __name__ == "__main__":
    cli.run(main)
