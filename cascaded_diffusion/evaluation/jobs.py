"""The work of `evaluate` and `reference` on a run and its samples, as functions of settings.

All of them raise UserError if another job evaluates the run at the same time. Every process of a
job calls `score_checkpoints`, `final_numbers` and `sweep_settings`, of which process 0 returns
what was found; the others are for one process.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, eval_sampler, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import (
    Evaluation,
    Evaluator,
    default_mesh,
    evaluated_labels,
)
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.final import final_order, measure_final
from cascaded_diffusion.evaluation.reference import Reference
from cascaded_diffusion.evaluation.samples.generate import put_batch
from cascaded_diffusion.evaluation.samples.sample_sources import (
    RealSplit,
    SampleSource,
    StageSampling,
)
from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages
from cascaded_diffusion.evaluation.score import RunScorer, SampleWork
from cascaded_diffusion.evaluation.settings import Setting, bound_chain, final_count, with_setting
from cascaded_diffusion.evaluation.sweep import Sweep, best_setting
from cascaded_diffusion.evaluation.team import Order, Team
from cascaded_diffusion.evaluation.trained import load_trained
from cascaded_diffusion.files.json_files import (
    Record,
    append_line,
    write_json,
)
from cascaded_diffusion.files.locks import held_lock
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder
from cascaded_diffusion.types import Params

_POLL_SECS = 5.0  # between looks for new checkpoints
_LEVEL_IMAGES = 64  # that are enlarged at every level


def score_checkpoints(
    folder: RunFolder,
    evaluation: Evaluation,
    *,
    below: Sequence[RunFolder] = (),
    low_res_samples: StoredImages | None = None,
    follow: bool = False,
) -> Record:
    """Scores a run's checkpoints that have no score yet; returns the record of the best one.

    The enlargements of the samples of `below`, the runs of the stages below (see
    `settings.open_runs_below`), and of `low_res_samples` (see `settings.open_low_res_samples`) are
    scored as well. With `follow`, new checkpoints are scored until training ends. Raises UserError
    if no checkpoint could be scored.

        best = cd.score_checkpoints(run, evaluation)  # a record with step, ema_decay and value
    """
    config = folder.read_config()
    evaluation.check_count(config.eval.num_samples, config)
    mesh, team = default_mesh(config), Team(folder)
    sampling = StageSampling(
        stage=build_stage(config.stage),
        sampler=eval_sampler(config),
        aug_level=config.eval.aug_level,
        num_samples=config.eval.num_samples,
        seed=config.eval.seed,
        mesh=mesh,
    )

    def sources() -> list[SampleSource]:
        found = [sampling.alone(evaluation.splits["val"])]  # by which checkpoints are chosen
        if below:
            found.append(sampling.of_runs(below))
        if low_res_samples is not None:
            found.append(sampling.of_file(low_res_samples))
        return found

    if not team.leads:
        team.await_ready()
        extractor = evaluation.extractor(folder, config, mesh, say=_silent)
        work = SampleWork(config, folder, sources(), extractor, mesh)
        team.help(work.understand)
        return folder.best() or {}
    with evaluation.evaluator(folder, config, mesh) as evaluator, team.leading():
        scorer = RunScorer(config, folder, evaluator, sources(), mesh, team)
        with contextlib.closing(scorer):
            while True:
                # Asked before scoring, so that this scoring sees what was saved before the end.
                ended = folder.complete_path.exists()
                scored = scorer.score_new_checkpoints()
                # A trainer that goes on with an ended run has removed the file meanwhile.
                if not follow or (ended and folder.complete_path.exists()):
                    break
                time.sleep(_POLL_SECS)
        best = folder.best()
        if best is None or best.get("value") is None:  # chosen by an import, without a score
            see = f"see {folder.results_path}"
            raise UserError(f"--workdir={folder.path}: no checkpoint could be scored, {see}")
        if not scored:
            scorer.say_best(best)
        return best


def _silent(text: str) -> None:
    """What process 0 says already."""


def measure_samples(
    folder: RunFolder,
    evaluation: Evaluation,
    samples: StoredImages,
    *,
    num_samples: int | None = None,
) -> Record:
    """Measures the first of `load_samples`, by default all, as the run's own; stores no record."""
    config = folder.read_config()
    count = samples.count(num_samples)
    evaluation.check_count(count, config)
    with evaluation.evaluator(folder, config, default_mesh(config)) as evaluator:
        labels = samples.labels
        if labels is not None:
            labels = evaluated_labels(labels[:count], config.stage.num_classes)
        return {
            "samples": samples.path,
            "num_samples": count,
            "reference": evaluator.reference,
            "features": evaluator.extractor.identity,
            **evaluator.scores(samples.images, labels, count),
        }


def final_numbers(
    folder: RunFolder,
    evaluation: Evaluation,
    *,
    cascade: CascadeConfig | None = None,
    below: Sequence[RunFolder] = (),
    low_res_samples: StoredImages | None = None,
    num_samples: int | None = None,
) -> Record:
    """Measures a run's chosen checkpoint, or a whole cascade, against both splits.

    `below` are the runs of the stages below; `cascade` says how they and this run are sampled, by
    default every stage as its own config says. `low_res_samples`, from
    `settings.open_low_res_samples`, are enlarged instead of real images. The number of samples is
    by default `cascade.cascade.num_samples` or, of a run, `config.eval.final_num_samples`. A run's
    samples are drawn by another seed than those that chose its checkpoint, a cascade's by its own.
    Returns the content of RUN/eval/final_<source>.json. Raises UserError if a sample is not finite,
    or the classes cannot have as many samples each.

        record = cd.final_numbers(run, evaluation, num_samples=1000)["metrics"]
    """
    config = folder.read_config()
    section = None if cascade is None else cascade.cascade
    count = num_samples or final_count(config, section)
    # Enlargements of given images have their classes.
    generated = bool(below) or config.stage.kind == "base"
    evaluation.check_final_count(count, config, generated=generated)
    mesh, held_out = default_mesh(cascade or config), evaluation.splits["val"]
    settings, team = section or config.eval, Team(folder)
    # The samples of a run's own seed have chosen its checkpoint, and would flatter it.
    seed = (settings.seed + 1) % 2**32 if section is None else settings.seed
    trained = load_trained(folder, mesh)
    sampling = StageSampling(
        stage=trained.stage,
        sampler=config.stage.sampler if section is None else section.samplers[-1],
        aug_level=config.eval.aug_level,
        num_samples=count,
        seed=seed,
        mesh=mesh,
    )
    if below:
        source = sampling.of_runs(below, section)
    elif low_res_samples is not None:
        source = sampling.of_file(low_res_samples)
    else:
        source = sampling.alone(held_out)

    def order(extractor: FeatureExtractor) -> Order:
        return final_order(folder, trained, extractor, sampling, source, settings.batch_size)

    if not team.leads:
        team.await_ready()
        wanted = order(evaluation.extractor(folder, config, mesh, say=_silent))
        team.help(lambda record: wanted)
        return {}
    with (
        evaluation.evaluator(folder, config, mesh, ("train", "val")) as evaluator,
        team.leading(),
    ):
        levels = None
        if config.stage.has_aug_level:
            fewest = min(_LEVEL_IMAGES, config.eval.batch_size)
            levels = sampling.at_levels(held_out, num_images=fewest)
        wanted = order(evaluator.extractor)
        if section is not None:
            _say_if_chosen_by(section.seed, [*below, folder])
        try:
            record = measure_final(
                folder, trained, evaluator, sampling, source, levels, wanted, team
            )
        except (ValueError, DamagedBatchError) as e:  # a sample that is not finite, for one
            raise UserError(f"`evaluate final`: {e}") from e
    print((folder.eval / f"final_{source.kind}.md").read_text(), flush=True)
    return record


def _say_if_chosen_by(seed: int, runs: Sequence[RunFolder]) -> None:
    """Says which runs' checkpoints were chosen by samples of the seed that is measured now."""
    names = [run.path.name for run in runs if run.read_config().eval.seed == seed]
    if names:
        print(
            f"config.cascade.seed = {seed} is also config.eval.seed of {', '.join(names)}, by whose"
            " samples checkpoints were chosen: another seed gives a distance that is not flattered",
            flush=True,
        )


def bits_per_dim(
    folder: RunFolder,
    split: RealSplit,
    *,
    num_images: int | None = None,
    num_steps: int | None = None,
) -> Record:
    """The variational bound of the chosen checkpoint, its mean over real images.

    There is one draw of noise per step and image. By default, all images of the split are taken,
    and all steps of the stage's process. Returns the record, which is appended to the results.
    Raises UserError for a single image, or a bound that is not finite.
    """
    config = folder.read_config()
    settings, count = config.eval, min(len(split), num_images or len(split))
    if count < 2:
        raise UserError(f"bits/dim of {count} image: expected at least 2, for a standard error")
    chain = bound_chain(config.stage, num_steps)
    # Spread over the split, which may be sorted by class.
    examples = split.read([i * len(split) // count for i in range(count)])
    low_res = examples.get("low_res")  # stored; otherwise the stage makes it
    mesh, level, key = default_mesh(config), settings.aug_level, jax.random.key(settings.seed)
    trained = load_trained(folder, mesh)
    stage = trained.stage
    print(f"{trained.name}: the bound of {chain.num_steps} steps, variance {chain.variance}")

    @jax.jit
    def of_batch(
        params: Params,
        keys: jax.Array,
        image: jax.Array,
        label: jax.Array | None,
        low_res: jax.Array | None,
    ) -> jax.Array:
        return stage.bits_per_dim(
            params,
            keys,
            float_from_uint8(image),
            label=label,
            low_res=None if low_res is None else float_from_uint8(low_res),
            aug_level=level,
            sampler=chain,
        )

    progress = Progress(count, unit="images", label=f"bits/dim of {trained.name}")
    values = []
    for start in range(0, count, settings.batch_size):
        indices = np.arange(start, start + settings.batch_size)
        rows = indices % count  # the last batch is filled up with images that are not counted
        batch = of_batch(
            trained.params,
            keys_for(key, put_batch(indices, mesh)),
            put_batch(examples["image"][rows], mesh),
            put_batch(examples["label"][rows], mesh) if stage.config.num_classes else None,
            None if low_res is None else put_batch(low_res[rows], mesh),
        )
        values.append(np.asarray(batch)[: count - start])
        progress.update(min(count, start + settings.batch_size))
    progress.close()
    bits = np.concatenate(values).astype(np.float64)
    if infinite := np.sum(~np.isfinite(bits)):
        raise UserError(f"bits/dim of {trained.name}: not finite for {infinite} of {count} images")
    record = {
        **dataclasses.asdict(trained.chosen),
        "metric": "bits_per_dim",
        "value": float(bits.mean()),
        "standard_error": float(bits.std(ddof=1) / np.sqrt(count)),
        "num_images": count,
        "reference": f"{config.data.name}:{split.split}:{stage.config.resolution}px",
        "aug_level": level if stage.config.has_aug_level else None,
        "chain": to_dict(chain),
        "seed": settings.seed,
    }
    with folder.writer_lock("eval"):
        append_line(folder.results_path, record)
    return record


def sweep_settings(
    runs: CascadeFolder,
    config: CascadeConfig,
    evaluation: Evaluation,
    settings: Sequence[Setting],
    *,
    index: int,
    write_best: bool = False,
) -> Setting:
    """Scores stage `index` of a trained cascade in several settings; returns the best setting.

    `evaluation` is with the real images of that stage's run, `settings` are from
    `settings.checked_settings`. With `write_best`, RUNS/cascade.json is written, the cascade with
    the best setting. Samples that choose are drawn by the run's `eval.seed`, like those that chose
    its checkpoint, and not by the cascade's seed: the chosen ones would flatter its final numbers.
    Raises UserError if another process sweeps the cascade, or all settings fail.

        best = cd.sweep_settings(runs, config, evaluation, settings, index=1)
    """
    section = config.cascade
    folders = runs.stage_folders(section)[: index + 1]
    run = folders[-1].read_config()
    evaluation.check_final_count(section.num_samples, run, generated=True)
    drawn = dataclasses.replace(section, seed=run.eval.seed)
    mesh, team = default_mesh(config), Team(folders[-1])
    trained = [load_trained(folder, mesh) for folder in folders]
    if not team.leads:
        team.await_ready()
        extractor = evaluation.extractor(folders[-1], run, mesh, say=_silent)
        search = Sweep(drawn, trained, Evaluator(extractor, {}, False), runs.sweep, mesh, team)
        team.help(lambda record: search.order(settings[record["setting"]]))
        return settings[0]
    with held_lock(runs.path, "sweep", "workdir"):
        with evaluation.evaluator(folders[-1], run, mesh) as evaluator:
            pass  # made; the run's checkpoints may be scored meanwhile
        with team.leading():
            search = Sweep(drawn, trained, evaluator, runs.sweep, mesh, team)
            try:
                rows = search.run(settings)
            except (ValueError, DamagedBatchError) as e:  # of the stages below, for one
                raise UserError(f"`evaluate sweep`: {e}") from e
            best = best_setting(settings, rows, search.metric)
        print(f"{section.stages[index]}: best is {best}", flush=True)
        if write_best:
            chosen = with_setting(section, index, best)
            write_json(runs.cascade_path, to_dict(CascadeConfig(cascade=chosen, mesh=config.mesh)))
            print(f"{runs.cascade_path}: written", flush=True)
    return best


def write_references(
    folder: RunFolder,
    config: RunConfig,
    evaluation: Evaluation,
    roles: Sequence[str] = ("train", "val"),
) -> Mapping[str, Reference]:
    """Makes those reference statistics of a run that its folder does not hold yet, by role."""
    with evaluation.evaluator(folder, config, default_mesh(config), roles) as evaluator:
        for role, reference in evaluator.references.items():
            path = folder.eval / f"reference_{role}.npz"
            print(f"{path}: {reference.name}, {evaluator.extractor.identity}", flush=True)
        return evaluator.references
