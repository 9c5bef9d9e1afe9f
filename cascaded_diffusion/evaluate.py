"""Scores a run's checkpoints and picks the best; scores samples; searches after training.

    python -m cascaded_diffusion.evaluate --workdir=RUN/base16
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --low_res_run=RUN/base16
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --samples=RUN/samples/samples.npz
    python -m cascaded_diffusion.evaluate --workdir=RUN/base16 --bits_per_dim=test
    python -m cascaded_diffusion.evaluate --sweep --workdir=RUN --config=configs/mnist_cascade32.py
        --aug_levels=0,0.1,0.2,0.3 --truncated=false,true --write_best

A process of its own, beside the trainer or after it. It reads the run folder and
writes RUN/eval/results.jsonl, RUN/eval/best.json, sample grids, and RUN/EARLY_STOP
when scores have stopped to improve. What is scored already is not scored again.

--sweep scores one stage of a trained cascade in every combination of --aug_levels,
--truncated, --samplers, --num_steps and --guidance_scales, and writes a table and a
plot below RUN/sweep. --write_best then writes RUN/cascade.json, the cascade with the
best of them, which `sample --workdir=RUN` and the next --sweep use without --config.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config import (
    CascadeConfig,
    CascadeSection,
    RunConfig,
    SamplerConfig,
    StageConfig,
    to_dict,
)
from cascaded_diffusion.config_checks import check_chain, check_devices
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import settings as settings_lib
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder
from cascaded_diffusion.runtime.samples import load_samples

_POLL_SECS = 5.0
_SWEEP_FLAGS = ("stage", "aug_levels", "truncated", "samplers", "num_steps", "guidance_scales")


def _define_flags(argv: Sequence[str]) -> flags.FlagValues:
    fv = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "the run folder to score; with --sweep the folder of runs", flag_values=fv
    )
    flags.DEFINE_string(
        "low_res_run",
        None,
        "run folder of the stage below: score enlargements of its samples too",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "samples", None, "score this .npz (arr_0 uint8 NHWC, arr_1 labels) instead", flag_values=fv
    )
    flags.DEFINE_bool(
        "follow", False, "keep scoring new checkpoints until training ends", flag_values=fv
    )
    flags.DEFINE_string(
        "bits_per_dim",
        None,
        "a split: the chosen checkpoint's variational bound over its images, in --num_steps",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "num_images", None, "of that split; default: all of it", lower_bound=2, flag_values=fv
    )
    flags.DEFINE_bool("sweep", False, "search a trained cascade's settings", flag_values=fv)
    cli.define_config(fv, argv, "with --sweep: the cascade's config file")
    flags.DEFINE_string("stage", None, "stage to sweep; default: the last", flag_values=fv)
    flags.DEFINE_list("aug_levels", [], "levels to try, e.g. 0,0.1,0.2", flag_values=fv)
    flags.DEFINE_list("truncated", [], "false, true or false,true", flag_values=fv)
    flags.DEFINE_list("samplers", [], "e.g. ddim,dpmpp_2m,heun,ancestral", flag_values=fv)
    flags.DEFINE_list("num_steps", [], "e.g. 4,8,16", flag_values=fv)
    flags.DEFINE_list("guidance_scales", [], "e.g. 1,1.5", flag_values=fv)
    flags.DEFINE_bool("write_best", False, "write RUN/cascade.json", flag_values=fv)
    return fv


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = _define_flags(argv)
    cli.parse(fv, argv, __doc__)
    cli.require(fv, "workdir")
    if fv.sweep:
        for name in ("low_res_run", "samples", "follow", "bits_per_dim", "num_images"):
            if fv[name].value:
                raise UserError(f"--sweep does not go with --{name}: leave one of them out")
        return _sweep(fv, argv)
    overrides = cli.overrides_in(argv)
    if overrides:
        raise UserError(
            f"{overrides[0]}: only for --sweep; a run is scored by its own config, which a call of"
            " `main` with this override changes where that is allowed"
        )
    for name in (*_SWEEP_FLAGS, "write_best", "config"):
        if fv[name].value and not (name == "num_steps" and fv.bits_per_dim is not None):
            raise UserError(f"--{name} is only for --sweep: add it, or leave --{name} out")
    return _score_run(fv)


def _score_run(fv: flags.FlagValues) -> int:
    folder = RunFolder(fv.workdir)
    config = folder.read_config()
    folder.check_writable()
    modes = [n for n in ("samples", "bits_per_dim") if fv[n].value is not None]
    if len(modes) > 1 or (modes and (fv.follow or fv.low_res_run is not None)):
        raise UserError(
            f"--{modes[0]} is a thing of its own: leave out --follow, --low_res_run and"
            " --samples or --bits_per_dim"
        )
    if fv.num_images is not None and fv.bits_per_dim is None:
        raise UserError("--num_images is only for --bits_per_dim: add it, or leave it out")
    previous_folder, stored = None, None
    if fv.low_res_run is not None:
        previous_folder = RunFolder(fv.low_res_run, flag="low_res_run")
        _check_previous(previous_folder, config)
    if fv.samples is not None:
        stored = load_samples(fv.samples, config.stage)
    chain = None
    if fv.bits_per_dim is not None:
        folder.chosen()
        chain = _bound_chain(fv, config.stage)

    jax = cli.set_up_jax()
    from cascaded_diffusion.evaluation import score
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh

    if fv.bits_per_dim is not None:
        return _bits_per_dim(fv, folder, config, chain)
    train, held_out = _real_images(config)
    check_devices(config, jax.device_count())
    mesh = build_mesh(config.mesh)
    with folder.writer_lock("eval"):
        judge = _judge(config, folder, train, held_out)
        if stored is not None:
            record = score.record_for_samples(
                judge, fv.samples, *stored, num_classes=config.stage.num_classes
            )
            print(json.dumps(record), flush=True)
            return 0
        previous = None if previous_folder is None else load_trained(previous_folder, mesh)
        scorer = score.RunScorer(config, folder, judge, held_out, mesh, previous=previous)
        while True:
            # Asked before scoring: what is saved before the end is then seen by
            # the scoring that follows.
            ended = not fv.follow or folder.complete_path.exists()
            scored = scorer.score_new_checkpoints()
            if ended:
                best = folder.best()
                if best is None:
                    raise UserError(
                        f"--workdir={fv.workdir}: no checkpoint could be scored; train first, or"
                        " add --follow to wait for checkpoints"
                    )
                if not scored:
                    scorer.say_best(best)
                return 0
            time.sleep(_POLL_SECS)


def _real_images(config: RunConfig) -> list[Any]:
    """The whole training and evaluation split, in memory."""
    from cascaded_diffusion.data.sources import examples, load_source
    from cascaded_diffusion.evaluation.judge import labelled

    data = config.data
    sources = [
        load_source(data, split, config.stage) for split in (data.train_split, data.eval_split)
    ]
    return [labelled(examples(source, range(len(source)))) for source in sources]


def _judge(config: RunConfig, folder: RunFolder, train: Any, held_out: Any) -> Any:
    from cascaded_diffusion.evaluation.judge import build_judge

    judge = build_judge(config, folder, train, held_out)
    print(
        f"{config.stage.name}: classifier at {config.stage.resolution} px recognises"
        f" {100 * judge.classifier.accuracy:.1f} % of the {len(held_out.labels)} held-out real"
        " images",
        flush=True,
    )
    return judge


def _check_previous(folder: RunFolder, config: RunConfig) -> None:
    below = folder.read_config().stage
    if config.stage.kind != "super_resolution":
        raise UserError(
            f"--low_res_run={folder.path}: only for super-resolution stages; the run to score,"
            f" {config.stage.name!r}, is a base model"
        )
    if below.kind != "base":
        raise UserError(
            f"--low_res_run={folder.path}: {below.name!r} enlarges images itself; only a base"
            " model can feed a stage here, a longer cascade is scored by sampling it"
            " (`python -m cascaded_diffusion.sample`) and --samples, or by --sweep"
        )
    chain = CascadeSection(
        stages=(below.name, config.stage.name),
        configs=("", ""),
        aug_levels=(config.eval.aug_level,),
        truncated=False,
        samplers=(below.sampler, config.stage.sampler),
        num_samples=config.eval.num_samples,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
    )
    try:
        check_chain(chain, (below, config.stage))
    except UserError as e:
        raise UserError(f"--low_res_run={folder.path}: {e}") from e
    folder.chosen()


def _bound_chain(fv: flags.FlagValues, stage: StageConfig) -> SamplerConfig:
    """The chain whose bound is computed: all steps of the process unless told otherwise.

    The bound is one of ancestral steps, however the stage is sampled otherwise.
    """
    steps = stage.schedule.num_timesteps or 1000
    if fv.num_steps:
        given = _numbers(fv, "num_steps", int)
        if len(given) != 1 or given[0] < 1:
            raise UserError(f"--num_steps={','.join(fv.num_steps)}: expected one number of steps")
        (steps,) = given
    chain = dataclasses.replace(
        stage.sampler,
        name="ancestral",
        num_steps=steps,
        grid="uniform",
        variance="learned" if stage.diffusion.variance == "learned" else "large",
        variance_interpolation=None,
        eta=None,
        guidance_scale=1.0,
        threshold="static",
        threshold_percentile=None,
    )
    if (stage.schedule.discrete_timesteps or steps) < steps:
        raise UserError(
            f"--num_steps={steps}: expected at most {stage.schedule.discrete_timesteps}, the"
            f" config.stage.schedule.num_timesteps of {stage.name!r}"
        )
    return chain


def _bits_per_dim(
    fv: flags.FlagValues, folder: RunFolder, config: RunConfig, chain: SamplerConfig
) -> int:
    import jax

    from cascaded_diffusion.data.sources import examples, load_source
    from cascaded_diffusion.evaluation.judge import labelled
    from cascaded_diffusion.evaluation.likelihood import bits_per_dim
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh
    from cascaded_diffusion.runtime.run_folder import append_line

    try:
        source = load_source(config.data, fv.bits_per_dim, config.stage)
    except UserError as e:
        raise UserError(f"--bits_per_dim={fv.bits_per_dim}: {e}") from e
    count = min(len(source), fv.num_images or len(source))
    # Spread over the split, which may be sorted by class.
    images = labelled(examples(source, [i * len(source) // count for i in range(count)]))
    check_devices(config, jax.device_count())
    mesh = build_mesh(config.mesh)
    trained = load_trained(folder, mesh)
    print(f"{trained.name}: the bound of {chain.num_steps} steps, variance {chain.variance}")
    values = bits_per_dim(
        trained,
        images,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
        aug_level=config.eval.aug_level,
        sampler=chain,
        mesh=mesh,
    )
    stage = config.stage
    record = {
        "step": trained.chosen.step,
        "ema_decay": trained.chosen.ema_decay,
        "metric": "bits_per_dim",
        "value": values["bits_per_dim"],
        "standard_error": values["bits_per_dim_error"],
        "num_images": count,
        "reference": f"{config.data.name}:{fv.bits_per_dim}:{stage.resolution}px",
        "aug_level": config.eval.aug_level if stage.has_level else None,
        "chain": to_dict(chain),
        "seed": config.eval.seed,
    }
    with folder.writer_lock("eval"):
        append_line(folder.results_path, record)
    print(json.dumps(record), flush=True)
    return 0


def _numbers(fv: flags.FlagValues, name: str, kind: type) -> list[Any]:
    try:
        return [kind(x) for x in fv[name].value]
    except ValueError as e:
        wanted = "integers" if kind is int else "numbers"
        raise UserError(
            f"--{name}={','.join(fv[name].value)}: expected {wanted} between commas"
        ) from e


def _truth_values(fv: flags.FlagValues) -> list[bool]:
    names = {"true": True, "false": False}
    if not {x.lower() for x in fv.truncated} <= set(names):
        raise UserError(
            f"--truncated={','.join(fv.truncated)}: expected true, false, or both between commas"
        )
    return [names[x.lower()] for x in fv.truncated]


def _sweep(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    runs = CascadeFolder(fv.workdir)
    config = cli.cascade_config(fv, argv, runs)
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
    if fv.truncated and not stages[-1].has_level:
        raise UserError(
            f"--truncated: {name!r} was trained with config.stage.augment.name ="
            f" {stages[-1].augment.name!r} and has no level to truncate at"
        )
    settings = settings_lib.make_settings(
        section,
        index,
        stages[-1],
        aug_levels=_numbers(fv, "aug_levels", float),
        truncated=_truth_values(fv),
        samplers=fv.samplers,
        num_steps=_numbers(fv, "num_steps", int),
        guidance_scales=_numbers(fv, "guidance_scales", float),
    )
    if fv.write_best:  # what is written must be good as a whole
        stages = [folder.read_config().stage for folder in runs.stage_folders(section)]
    for setting in settings:
        candidate = settings_lib.with_setting(section, index, setting)
        try:
            cli.check_cascade(dataclasses.replace(config, cascade=candidate), stages)
        except UserError as e:
            given = [f"--{name}" for name in _SWEEP_FLAGS if fv[name].value]
            raise UserError(f"{', '.join(given) or '--sweep'}: {e}") from e
    for folder in folders:
        folder.chosen()
    runs.check_writable()

    jax = cli.set_up_jax()
    from cascaded_diffusion.evaluation import sweep as sweep_lib
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh

    check_devices(config, jax.device_count())
    mesh = build_mesh(config.mesh)
    with runs.sweep_lock():
        with folders[-1].writer_lock("eval"):
            judge = _judge(run_configs[-1], folders[-1], *_real_images(run_configs[-1]))
        search = sweep_lib.Sweep(
            section,
            [load_trained(folder, mesh) for folder in folders],
            judge,
            runs.sweep,
            mesh,
            num_samples=section.num_samples,
            batch_size=section.batch_size,
        )
        rows = search.run(settings)
        best = sweep_lib.best_setting(settings, rows)
        print(f"{name}: best is {best}", flush=True)
        if fv.write_best:
            chosen = settings_lib.with_setting(section, index, best)
            runs.write_cascade(CascadeConfig(cascade=chosen, mesh=config.mesh))
            print(f"{runs.cascade_path}: written", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
