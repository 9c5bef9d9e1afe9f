"""The work of `evaluate` and `reference` on a run and its samples, as functions of settings.

They have these arguments in common:

    splits               the run's real images by role: "train" and "val"
    allow_few_samples    allow an FID of fewer than 2,048 samples, which is mostly bias
    inception            (resize=, mesh=) -> FID's extractor, if the run is scored by it
    mesh                 by default all devices, or for a cascade its config's mesh

All raise UserError if another process evaluates the run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.run_checks import check_sample_count
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, eval_sampler
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import setup
from cascaded_diffusion.evaluation.evaluator import evaluated_labels
from cascaded_diffusion.evaluation.features.inception_extractor import load_inception
from cascaded_diffusion.evaluation.final import measure_final
from cascaded_diffusion.evaluation.reference import Reference
from cascaded_diffusion.evaluation.samples.sample_sources import at_levels, run_source
from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages
from cascaded_diffusion.evaluation.score import RunScorer
from cascaded_diffusion.evaluation.settings import Setting, with_setting
from cascaded_diffusion.evaluation.sweep import Sweep, best_setting
from cascaded_diffusion.evaluation.trained import load_trained
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

_POLL_SECS = 5.0
# The number of images whose enlargements show how a stage responds to its level.
_LEVEL_IMAGES = 64


def score_checkpoints(
    folder: RunFolder,
    splits: setup.Splits,
    *,
    below: Sequence[RunFolder] = (),
    low_res_samples: StoredImages | None = None,
    follow: bool = False,
    allow_few_samples: bool = False,
    inception: setup.InceptionLoader = load_inception,
    mesh: Mesh | None = None,
) -> Mapping[str, Any]:
    """Scores a run's checkpoints that have no score yet and chooses the best.

    Args:
      folder: the run.
      below: the runs of the stages below, see `inputs.open_runs_below`: enlargements of their
        samples are scored as well.
      low_res_samples: from `inputs.open_low_res_samples`: their enlargements are scored as well.
      follow: keep scoring new checkpoints until training ends.

    Returns:
      The record of the best checkpoint.

    Raises:
      UserError: another process evaluates the run, or no checkpoint could be scored.
    """
    config = folder.read_config()
    settings = config.eval
    check_sample_count(settings.num_samples, settings.features, allow_few=allow_few_samples)
    mesh = mesh or setup.default_mesh(config)
    with setup.run_evaluator(folder, config, splits, ("train",), inception, mesh) as evaluator:
        source = partial(
            run_source,
            config,
            build_stage(config.stage),
            eval_sampler(config),
            held_out=splits["val"],
            num_samples=settings.num_samples,
            seed=settings.seed,
            mesh=mesh,
        )
        # Checkpoints are chosen by the first.
        sources = [source()]
        if below:
            sources.append(source(below=below))
        if low_res_samples is not None:
            sources.append(source(low_res=low_res_samples))
        scorer = RunScorer(config, folder, evaluator, sources, mesh)
        while True:
            # Asked before scoring, so that this scoring sees whatever was saved before the end.
            ended = not follow or folder.complete_path.exists()
            scored = scorer.score_new_checkpoints()
            if ended:
                break
            time.sleep(_POLL_SECS)
        scorer.close()
        best = folder.best()
        if best is None:
            raise UserError(
                f"--workdir={folder.path}: no checkpoint could be scored, see {folder.results_path}"
            )
        if not scored:
            scorer.say_best(best)
        return best


def measure_samples(
    folder: RunFolder,
    splits: setup.Splits,
    samples: StoredImages,
    *,
    num_samples: int | None = None,
    allow_few_samples: bool = False,
    inception: setup.InceptionLoader = load_inception,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Measures stored samples as the run's own are measured. Nothing is recorded.

    Args:
      folder: the run.
      samples: from `stored_images.load_samples`.
      num_samples: how many of them, the first; by default all.

    Returns:
      The record.
    """
    config = folder.read_config()
    count = num_samples or len(samples)
    check_sample_count(count, config.eval.features, allow_few=allow_few_samples)
    mesh = mesh or setup.default_mesh(config)
    with setup.run_evaluator(folder, config, splits, ("train",), inception, mesh) as evaluator:
        labels = samples.labels
        if labels is not None:
            labels = evaluated_labels(labels[:count], config.stage.num_classes)
        return {
            "samples": samples.path,
            "num_samples": count,
            "reference": evaluator.reference,
            "features": evaluator.features,
            **evaluator.scores(samples.images, labels, count),
        }


def final_numbers(
    folder: RunFolder,
    splits: setup.Splits,
    *,
    cascade: CascadeConfig | None = None,
    below: Sequence[RunFolder] = (),
    low_res_samples: StoredImages | None = None,
    num_samples: int | None = None,
    allow_few_samples: bool = False,
    inception: setup.InceptionLoader = load_inception,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Measures a run's chosen checkpoint, or a whole cascade, against both splits.

    Args:
      folder: the run, which is the last one of a cascade.
      cascade: how the cascade of `below` and this run is sampled; by default every stage is
        sampled as its own config says.
      below: the runs of the stages below.
      low_res_samples: from `inputs.open_low_res_samples`: images to enlarge instead of real ones.
      num_samples: by default `config.eval.final_num_samples`.

    Returns:
      The content of RUN/eval/final_<source>.json.

    Raises:
      UserError: another process evaluates the run, or a sample is not finite.
    """
    config = folder.read_config()
    count = num_samples or config.eval.final_num_samples
    check_sample_count(count, config.eval.features, allow_few=allow_few_samples)
    mesh = mesh or setup.default_mesh(cascade or config)
    section = None if cascade is None else cascade.cascade
    sampler = config.stage.sampler if section is None else section.samplers[-1]
    how = dict(seed=(section or config.eval).seed, mesh=mesh)
    roles = ("train", "val")
    with setup.run_evaluator(folder, config, splits, roles, inception, mesh) as evaluator:
        trained = load_trained(folder, mesh)
        source = run_source(
            config,
            trained.stage,
            sampler,
            held_out=splits["val"],
            num_samples=count,
            below=below,
            low_res=low_res_samples,
            cascade=section,
            **how,
        )
        levels = None
        if config.stage.has_aug_level:
            num_images = min(_LEVEL_IMAGES, config.eval.batch_size)
            levels = at_levels(trained.stage, sampler, splits["val"], num_images=num_images, **how)
        try:
            record = measure_final(
                config,
                folder,
                trained,
                evaluator,
                source,
                num_samples=count,
                seed=how["seed"],
                batch_size=(section or config.eval).batch_size,
                levels=levels,
            )
        except (ValueError, DamagedBatchError) as e:  # a sample that is not finite, for one
            raise UserError(f"--final: {e}") from e
    print((folder.eval / f"final_{source.kind}.md").read_text(), flush=True)
    return record


def sweep_settings(
    runs: CascadeFolder,
    config: CascadeConfig,
    splits: setup.Splits,
    settings: Sequence[Setting],
    *,
    stage: int = -1,
    write_best: bool = False,
    allow_few_samples: bool = False,
    inception: setup.InceptionLoader = load_inception,
    mesh: Mesh | None = None,
) -> Setting:
    """Scores one stage of a trained cascade in several settings.

    Args:
      runs: the folder of the stages' runs.
      config: the cascade.
      splits: the real images of the stage's run.
      settings: from `settings.checked_settings`.
      stage: the place of the stage in the cascade.
      write_best: write RUNS/cascade.json, the cascade with the best setting.

    Returns:
      The best setting.

    Raises:
      UserError: another process sweeps the cascade, or every setting failed.
    """
    section = config.cascade
    index = stage % len(section.stages)
    folders = runs.stage_folders(section)[: index + 1]
    last, run = folders[-1], folders[-1].read_config()
    check_sample_count(section.num_samples, run.eval.features, allow_few=allow_few_samples)
    mesh = mesh or setup.default_mesh(config)
    with runs.sweep_lock():
        with setup.run_evaluator(last, run, splits, ("train",), inception, mesh) as evaluator:
            pass  # made; the run's checkpoints may be scored meanwhile
        search = Sweep(
            section,
            [load_trained(folder, mesh) for folder in folders],
            evaluator,
            runs.sweep,
            mesh,
            num_samples=section.num_samples,
            batch_size=section.batch_size,
        )
        rows = search.run(settings)
        best = best_setting(settings, rows, search.metric)
        print(f"{section.stages[index]}: best is {best}", flush=True)
        if write_best:
            chosen = with_setting(section, index, best)
            runs.write_cascade(CascadeConfig(cascade=chosen, mesh=config.mesh))
            print(f"{runs.cascade_path}: written", flush=True)
    return best


def write_references(
    folder: RunFolder,
    config: RunConfig,
    splits: setup.Splits,
    roles: Sequence[str] = ("train", "val"),
    *,
    inception: setup.InceptionLoader = load_inception,
    mesh: Mesh | None = None,
) -> Mapping[str, Reference]:
    """Makes those reference statistics of a run that its folder does not hold yet, by role.

    Raises:
      UserError: another process evaluates the run.
    """
    mesh = mesh or setup.default_mesh(config)
    with setup.run_evaluator(folder, config, splits, roles, inception, mesh) as evaluator:
        pass
    for role, reference in evaluator.references.items():
        print(
            f"{folder.eval}/reference_{role}.npz: {reference.name}, {evaluator.features}",
            flush=True,
        )
    return evaluator.references
