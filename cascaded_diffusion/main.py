"""Trains one stage.

    python -m cascaded_diffusion.main --config=configs/mnist_base16.py --workdir=RUN/base16

Without --workdir the run goes to RUN/<name of the stage>.

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

import pathlib
import re
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import (
    cluster_flags,
    config_flags,
    entry,
    flag_checks,
    jax_setup,
    run_images,
)
from cascaded_diffusion.config.run_checks import check_devices, check_resume, run_config_from
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning import plan_topology
from cascaded_diffusion.runtime.run_data import RunData
from cascaded_diffusion.runtime.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, e.g. configs/mnist_base16.py")
    flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run, made if missing; default: RUN/<name of the stage>",
        flag_values=fv,
    )
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
    cluster_flags.define_cluster(fv)
    config_flags.parse(fv, argv, __doc__)
    flag_checks.require(fv, "config")
    as_given = run_config_from(config_flags.config_values(fv, argv))
    name, said = as_given.stage.name, []
    if fv.workdir is None:
        fv.workdir = str(pathlib.Path("RUN") / name)
        said.append(f"--workdir was not given: the run goes to {fv.workdir}")
    flag_checks.check_paths(fv, "workdir", "data_path")
    profile_steps = _profile_steps(fv.profile_steps, as_given.train.train_steps)
    config = run_images.with_absolute_paths(as_given, fv.data_path)
    folder = RunFolder(fv.workdir)
    folder.check_writable()
    if folder.exists():
        check_resume(folder.read_config(), config, fv.workdir)

    cluster = cluster_flags.join_cluster(fv, config, "workdir")
    jax = jax_setup.set_up_jax(cluster)
    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.data.loader import build_stream, iterate
    from cascaded_diffusion.data.sources import load_splits, spread_examples
    from cascaded_diffusion.runtime.mesh import (
        batch_share,
        broadcast_from_process_0,
        build_mesh,
        fail_on_all_processes,
    )
    from cascaded_diffusion.training.grid import GRID_COLUMNS, GRID_ROWS
    from cascaded_diffusion.training.loop import train

    # Whatever may be wrong is found before anything is written.
    build_stage(config.stage)
    with fail_on_all_processes():
        splits = [config.data.train_split, config.data.eval_split]
        sources = load_splits(config.data, list(dict.fromkeys(splits)), config.stage)
        source, held_out = (sources[split] for split in splits)
        grid_examples = spread_examples(held_out, rows=GRID_ROWS, columns=GRID_COLUMNS)
    (memory_mib,) = broadcast_from_process_0([int(plan_topology.device_bytes() / 2**20)])
    divided, choice = plan_topology.divided(config, jax.device_count(), memory_mib * 2**20)
    check_devices(divided, jax.device_count())
    warning = plan_topology.check_memory(divided, jax.device_count(), memory_mib * 2**20)
    mesh = build_mesh(divided.mesh)
    index, count = batch_share(mesh)
    with fail_on_all_processes():
        stream = build_stream(
            source,
            config.data,
            global_batch_size=config.train.batch_size,
            process_index=index,
            process_count=count,
        )
    if jax.process_index() == 0:
        for line in [*said, choice, warning and f"warning: {warning}"]:
            if line:
                print(f"{name}: {line}", flush=True)
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
        mesh=mesh,
    )
    if jax.process_index() > 0:  # one of them speaks for all
        return entry.EXIT_PREEMPTED if outcome.reason == "preempted" else 0
    if outcome.reason == "preempted":
        print(f"{name}: stopped by a signal at step {outcome.step}, saved; run it again to go on")
        return entry.EXIT_PREEMPTED
    if outcome.reason == "early_stop":
        print(
            f"{name}: stopped early at step {outcome.step}, as {folder.early_stop_path} asks; to go"
            f" on all the same, {folder.how_to_resume()}"
        )
    else:
        print(f"{name}: finished, {outcome.step} steps ({folder.path})")
    return 0


def _profile_steps(text: str | None, train_steps: int) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= train_steps:
        raise UserError(
            f"--profile_steps={text}: expected FIRST:LAST, as 100:105, steps from 1 to"
            f" config.train.train_steps = {train_steps}"
        )
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    entry.run(main)
