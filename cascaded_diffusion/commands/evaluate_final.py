"""`evaluate --final`: the last numbers of a run's chosen checkpoint, or of a cascade."""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, jax_setup, overrides
from cascaded_diffusion.commands.evaluate_run import (
    build_run_evaluator,
    folders_below,
    live_source,
    low_res_samples,
)
from cascaded_diffusion.commands.run_images import check_same_run_classes, real_splits
from cascaded_diffusion.config.run_checks import check_chain, check_sample_count, evaluation_mesh
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

# Images whose enlargements show how a stage responds to its level.
_LEVEL_IMAGES = 64


def evaluate_final(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    """The final numbers of a run's chosen checkpoint, or of a cascade. Returns the exit code."""
    section, cascade = None, None
    if fv.config is not None or not RunFolder(fv.workdir).exists():
        runs = CascadeFolder(fv.workdir)
        if fv.config is None and not runs.cascade_path.exists():
            RunFolder(fv.workdir).read_config()  # says that there is no run
        cascade = config_flags.cascade_config(fv, argv, runs)
        section = cascade.cascade
        *below, folder = runs.stage_folders(section)
        config = folder.read_config()
        check_chain(section, [f.read_config().stage for f in (*below, folder)])
        check_same_run_classes([*below, folder])
        for name in ("low_res_run", "low_res_samples"):
            if fv[name].value:
                raise UserError(f"--{name}: not with a cascade, which makes its own; leave it out")
    else:
        overrides.refuse_overrides(
            argv,
            "a run is measured by its own config, which a call of `main` with this override"
            " changes where that is allowed",
        )
        folder = RunFolder(fv.workdir)
        config = folder.read_config()
        below = folders_below(fv, config)
    count = fv.num_samples or config.eval.final_num_samples
    stored = low_res_samples(fv, config, count)
    if below and stored is not None:
        raise UserError("--low_res_run, --low_res_samples: one of them at a time with --final")
    check_sample_count(count, config.eval.features, allow_few=fv.allow_few_samples)
    for run in (*below, folder):
        run.chosen()
    folder.check_writable()

    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation.final import final_numbers
    from cascaded_diffusion.evaluation.samples import sample_sources as sources
    from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh

    splits = real_splits(folder, config, data_path=fv.data_path)
    settings = config if cascade is None else cascade
    mesh = build_mesh(evaluation_mesh(settings, jax.device_count()))
    seed = config.eval.seed if section is None else section.seed
    with folder.writer_lock("eval"):
        evaluator = build_run_evaluator(fv, config, folder, splits, mesh, ("train", "val"))
        trained = load_trained(folder, mesh)
        stage = trained.stage
        sampler = config.stage.sampler if section is None else section.samplers[-1]
        how = dict(num_samples=count, aug_level=config.eval.aug_level, seed=seed, mesh=mesh)
        if section is not None and below:
            source = sources.of_stages(
                [load_trained(f, mesh) for f in below],
                stage,
                section.samplers,
                section.aug_levels,
                truncated=section.truncated,
                kind="cascade",
                seed=seed,
                mesh=mesh,
            )
        elif below:
            source = live_source(config, stage, sampler, below, mesh)
        elif stored is not None:
            source = sources.of_file(stage, sampler, stored, **how)
        elif config.stage.kind == "base":
            source = sources.of_base(stage, sampler, seed=seed, mesh=mesh)
        else:
            source = sources.of_real_images(stage, sampler, splits["val"], **how)
        levels = None
        if config.stage.has_aug_level:
            levels = sources.at_levels(
                stage,
                sampler,
                splits["val"],
                num_images=min(_LEVEL_IMAGES, config.eval.batch_size),
                seed=seed,
                mesh=mesh,
            )
        try:
            record = final_numbers(
                config,
                folder,
                trained,
                evaluator,
                source,
                num_samples=count,
                seed=seed,
                batch_size=config.eval.batch_size if section is None else section.batch_size,
                levels=levels,
            )
        except (
            ValueError,
            DamagedBatchError,
        ) as e:  # samples that are not finite, a stored batch that is damaged
            raise UserError(f"--final: {e}") from e
    print((folder.eval / f"final_{source.kind}.md").read_text(), flush=True)
    print(json.dumps({"stage": record["stage"], **record["metrics"]}), flush=True)
    return 0
