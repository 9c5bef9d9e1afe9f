"""`evaluate --sweep`: the search over the ways to sample one stage of a trained cascade."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, flag_checks, jax_setup
from cascaded_diffusion.commands.evaluate_run import build_run_evaluator
from cascaded_diffusion.commands.run_images import check_same_run_classes, real_splits
from cascaded_diffusion.config.run_checks import check_sample_count, evaluation_mesh
from cascaded_diffusion.config.schema import CascadeConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import settings as settings_lib
from cascaded_diffusion.runtime.run_folder import CascadeFolder

SWEEP_FLAGS = ("stage", "aug_levels", "truncated", "samplers", "num_steps", "guidance_scales")


def _truth_values(fv: flags.FlagValues) -> list[bool]:
    names = {"true": True, "false": False}
    if not {x.lower() for x in fv.truncated} <= set(names):
        raise UserError(
            f"--truncated={','.join(fv.truncated)}: expected true, false, or both between commas"
        )
    return [names[x.lower()] for x in fv.truncated]


def evaluate_sweep(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    """Scores every setting. Returns the exit code; raises UserError."""
    runs = CascadeFolder(fv.workdir)
    config = config_flags.cascade_config(fv, argv, runs)
    section = config.cascade
    name = fv.stage or section.stages[-1]
    if name not in section.stages:
        raise UserError(
            f"--stage={name}: expected one of config.cascade.stages, {', '.join(section.stages)}"
        )
    index = section.stages.index(name)
    folders = runs.stage_folders(section)[: index + 1]
    run_configs = [folder.read_config() for folder in folders]
    stages = [c.stage for c in run_configs]
    if index == 0 and (fv.aug_levels or fv.truncated):
        raise UserError(
            f"--aug_levels, --truncated: {name!r} is a base model, without a low-res input"
        )
    if fv.truncated and not stages[-1].has_aug_level:
        raise UserError(
            f"--truncated: {name!r} was trained with config.stage.augment.name ="
            f" {stages[-1].augment.name!r} and has no level to truncate at"
        )
    settings = settings_lib.make_settings(
        section,
        index,
        stages[-1],
        aug_levels=flag_checks.numbers_in(fv, "aug_levels", float),
        truncated=_truth_values(fv),
        samplers=fv.samplers,
        num_steps=flag_checks.numbers_in(fv, "num_steps", int),
        guidance_scales=flag_checks.numbers_in(fv, "guidance_scales", float),
    )
    if fv.write_best:  # what is written must be good as a whole
        stages = [folder.read_config().stage for folder in runs.stage_folders(section)]
    for setting in settings:
        candidate = settings_lib.with_setting(section, index, setting)
        try:
            config_flags.check_cascade(dataclasses.replace(config, cascade=candidate), stages)
        except UserError as e:
            given = [f"--{name}" for name in SWEEP_FLAGS if fv[name].value]
            raise UserError(f"{', '.join(given) or '--sweep'}: {e}") from e
    check_same_run_classes(folders)
    for folder in folders:
        folder.chosen()
    check_sample_count(
        section.num_samples, run_configs[-1].eval.features, allow_few=fv.allow_few_samples
    )
    runs.check_writable()

    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation import sweep as sweep_lib
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh

    last, last_config = folders[-1], run_configs[-1]
    splits = real_splits(last, last_config, data_path=fv.data_path)
    mesh = build_mesh(evaluation_mesh(config, jax.device_count()))
    with runs.sweep_lock():
        with last.writer_lock("eval"):
            evaluator = build_run_evaluator(fv, last_config, last, splits, mesh, ("train",))
        search = sweep_lib.Sweep(
            section,
            [load_trained(folder, mesh) for folder in folders],
            evaluator,
            runs.sweep,
            mesh,
            num_samples=section.num_samples,
            batch_size=section.batch_size,
        )
        rows = search.run(settings)
        best = sweep_lib.best_setting(settings, rows, search.metric)
        print(f"{name}: best is {best}", flush=True)
        if fv.write_best:
            chosen = settings_lib.with_setting(section, index, best)
            runs.write_cascade(CascadeConfig(cascade=chosen, mesh=config.mesh))
            print(f"{runs.cascade_path}: written", flush=True)
    return 0
