"""`evaluate` on a run folder: its checkpoints, as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from cascaded_diffusion.commands import inception_flags, jax_setup
from cascaded_diffusion.commands.run_images import check_same_run_classes, real_splits
from cascaded_diffusion.config.run_checks import check_chain, check_sample_count, evaluation_mesh
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, eval_sampler
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, open_images
from cascaded_diffusion.runtime.run_folder import RunFolder

_POLL_SECS = 5.0


def build_run_evaluator(
    fv: flags.FlagValues,
    config: RunConfig,
    folder: RunFolder,
    splits: Mapping[str, Any],
    mesh: Any,
    roles: Sequence[str],
) -> Any:
    """Builds the evaluator of a run, with the references of the given roles ("train", "val")."""
    from cascaded_diffusion.evaluation.evaluator import build_evaluator, build_extractor

    extractor = build_extractor(
        config,
        folder,
        splits["train"],
        splits["val"],
        mesh,
        load_inception=inception_flags.inception_loader(fv, mesh),
        say=lambda line: print(line, flush=True),
    )
    return build_evaluator(config, folder, extractor, {role: splits[role] for role in roles})


def evaluate_checkpoints(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    """Scores checkpoints, once or until training ends. Returns the exit code."""
    below = folders_below(fv, config)
    stored = low_res_samples(fv, config, config.eval.num_samples)
    if not fv.follow and not folder.has_checkpoints():
        raise UserError(
            f"--workdir={fv.workdir}: no checkpoint there; train first, or add --follow to wait for"
            " checkpoints"
        )
    check_sample_count(
        config.eval.num_samples, config.eval.features, allow_few=fv.allow_few_samples
    )
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation import score
    from cascaded_diffusion.runtime.mesh import build_mesh

    splits = real_splits(folder, config, data_path=fv.data_path)
    mesh = build_mesh(evaluation_mesh(config, jax.device_count()))
    with folder.writer_lock("eval"):
        evaluator = build_run_evaluator(fv, config, folder, splits, mesh, ("train",))
        sources = _sources(config, splits["val"], below, stored, mesh)
        scorer = score.RunScorer(config, folder, evaluator, sources, mesh)
        while True:
            # Asked before scoring: what is saved before the end is then seen by
            # the scoring that follows.
            ended = not fv.follow or folder.complete_path.exists()
            scored = scorer.score_new_checkpoints()
            if ended:
                scorer.close()
                best = folder.best()
                if best is None:
                    raise UserError(
                        f"--workdir={fv.workdir}: no checkpoint could be scored, see"
                        f" {folder.results_path}"
                    )
                if not scored:
                    scorer.say_best(best)
                return 0
            time.sleep(_POLL_SECS)


def _sources(
    config: RunConfig,
    held_out: Any,
    below: Sequence[RunFolder],
    stored: StoredImages | None,
    mesh: Any,
) -> list[Any]:
    """What a run's checkpoints are scored on; they are chosen by the first."""
    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.evaluation.samples import sample_sources as sources

    stage, sampler = build_stage(config.stage), eval_sampler(config)
    if config.stage.kind == "base":
        return [sources.of_base(stage, sampler, seed=config.eval.seed, mesh=mesh)]
    how = dict(
        num_samples=config.eval.num_samples,
        aug_level=config.eval.aug_level,
        seed=config.eval.seed,
        mesh=mesh,
    )
    found = [sources.of_real_images(stage, sampler, held_out, **how)]
    if below:
        found.append(live_source(config, stage, sampler, below, mesh))
    if stored is not None:
        found.append(sources.of_file(stage, sampler, stored, **how))
    return found


def live_source(
    config: RunConfig, stage: Any, sampler: Any, below: Sequence[RunFolder], mesh: Any
) -> Any:
    """The stages below as they are scored themselves: their own samplers and levels."""
    from cascaded_diffusion.evaluation.samples.sample_sources import of_stages
    from cascaded_diffusion.evaluation.trained import load_trained

    configs = [folder.read_config() for folder in below]
    return of_stages(
        [load_trained(folder, mesh) for folder in below],
        stage,
        [*(c.stage.sampler for c in configs), sampler],
        [*(c.eval.aug_level for c in configs[1:]), config.eval.aug_level],
        truncated=False,
        kind="samples",
        seed=config.eval.seed,
        mesh=mesh,
    )


def folders_below(fv: flags.FlagValues, config: RunConfig) -> list[RunFolder]:
    """The runs of --low_res_run, checked to chain with the one to score."""
    folders = [RunFolder(path, flag="low_res_run") for path in fv.low_res_run]
    if not folders:
        return []
    given = f"--low_res_run={','.join(fv.low_res_run)}"
    configs = [folder.read_config() for folder in folders]
    if config.stage.kind != "super_resolution":
        raise UserError(
            f"{given}: only for super-resolution stages; the run to score,"
            f" {config.stage.name!r}, is a base model"
        )
    stages = [*(c.stage for c in configs), config.stage]
    chain = CascadeSection(
        stages=tuple(s.name for s in stages),
        configs=("",) * len(stages),
        aug_levels=(*(c.eval.aug_level for c in configs[1:]), config.eval.aug_level),
        truncated=False,
        samplers=tuple(s.sampler for s in stages),
        num_samples=config.eval.num_samples,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
    )
    try:
        check_chain(chain, stages)
    except UserError as e:
        raise UserError(f"{given}: {e}") from e
    check_same_run_classes([*folders, RunFolder(fv.workdir)])
    for folder in folders:
        folder.chosen()
    return folders


def low_res_samples(
    fv: flags.FlagValues, config: RunConfig, num_samples: int
) -> StoredImages | None:
    """The images of --low_res_samples, checked to be what the stage enlarges."""
    if fv.low_res_samples is None:
        return None
    given, stage = f"--low_res_samples={fv.low_res_samples}", config.stage
    if stage.kind != "super_resolution":
        raise UserError(f"{given}: {stage.name!r} is a base model, without a low-res input")
    stored = open_images(fv.low_res_samples, flag="low_res_samples")
    size = stage.low_res_resolution
    if tuple(stored.images.shape[1:]) != (size, size, stage.channels):
        raise UserError(
            f"{given}: images of {tuple(stored.images.shape[1:])}, expected"
            f" {(size, size, stage.channels)}, as {stage.name!r} enlarges"
        )
    if stage.num_classes and stored.labels is None:
        raise UserError(f"{given}: no labels (arr_1), which {stage.name!r} needs")
    if stage.num_classes and not (
        0 <= stored.labels.min() <= stored.labels.max() < stage.num_classes
    ):
        raise UserError(
            f"{given}: labels from {stored.labels.min()} to {stored.labels.max()}, expected 0 to"
            f" {stage.num_classes - 1}"
        )
    if len(stored) < num_samples:
        raise UserError(
            f"{given}: {len(stored)} images, expected the {num_samples} that are asked for"
        )
    return stored
