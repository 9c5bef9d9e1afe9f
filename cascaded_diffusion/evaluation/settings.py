"""How stages are sampled after training, and which images they enlarge; no device is needed.

Conditioning augmentation is amortized over its strength, so the strength can be chosen after
training (paper, section 3.3). Steps, sampler and guidance are free as well.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from cascaded_diffusion.config import schema
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import CascadeConfig, CascadeSection, RunConfig, StageConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, load_samples
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.runtime.run_folder import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to sample a stage: sampler, level of its low-res input, and mode.

    A base model has the level None. If `truncated`, the chain below is stopped at that level.
    """

    sampler: schema.SamplerConfig
    aug_level: float | None
    truncated: bool

    def describe(self) -> Record:
        """The cells of a table's row by column, which plots use as well."""
        return {
            "aug_level": self.aug_level,
            "truncated": self.truncated,
            "sampler": self.sampler.name,
            "num_steps": self.sampler.num_steps,
            "guidance": self.sampler.guidance_scale,
        }

    def __str__(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.describe().items() if v is not None)


def make_settings(
    section: CascadeSection,
    index: int,
    stage: StageConfig,
    *,
    aug_levels: Sequence[float] = (),
    truncated: Sequence[bool] = (),
    samplers: Sequence[str] = (),
    num_steps: Sequence[int] = (),
    guidance_scales: Sequence[float] = (),
) -> list[Setting]:
    """All combinations for stage `index`; choices that are not given stay as in the cascade."""
    own = section.samplers[index]
    levels: Sequence[float | None] = [None]
    # A base model has nothing to truncate. A stage without a level keeps the cascade's mode,
    # which concerns the stages below it.
    modes: Sequence[bool] = [False]
    if index > 0:
        levels = aug_levels or [section.aug_levels[index - 1]]
        modes = truncated or [section.truncated]
    combinations = itertools.product(
        levels,
        modes,
        samplers or [own.name],
        num_steps or [own.num_steps],
        guidance_scales or [own.guidance_scale],
    )
    settings = []
    for level, mode, name, steps, scale in combinations:
        usual = schema.sampler_named(name, own, stage)
        sampler = dataclasses.replace(usual, num_steps=steps, guidance_scale=scale)
        settings.append(Setting(sampler=sampler, aug_level=level, truncated=mode))
    return settings


def with_setting(section: CascadeSection, index: int, setting: Setting) -> CascadeSection:
    """The cascade with `setting` for stage `index`."""
    samplers, levels = list(section.samplers), list(section.aug_levels)
    samplers[index], truncated = setting.sampler, section.truncated
    if index > 0:
        levels[index - 1], truncated = setting.aug_level, setting.truncated
    return dataclasses.replace(
        section, aug_levels=tuple(levels), samplers=tuple(samplers), truncated=truncated
    )


def first_stages(section: CascadeSection, count: int) -> CascadeSection:
    """The first stages of a cascade as a cascade of their own."""
    return dataclasses.replace(
        section,
        stages=section.stages[:count],
        configs=section.configs[:count],
        samplers=section.samplers[:count],
        aug_levels=section.aug_levels[: count - 1],
    )


def chain_of(runs: Sequence[RunConfig]) -> CascadeSection:
    """A cascade of runs, each sampled as its own config says; the last one says how many."""
    names, last = tuple(run.stage.name for run in runs), runs[-1].eval
    return CascadeSection(
        stages=names,
        configs=names,
        aug_levels=tuple(run.eval.aug_level for run in runs[1:]),
        truncated=False,
        samplers=tuple(run.stage.sampler for run in runs),
        num_samples=last.num_samples,
        batch_size=last.batch_size,
        seed=last.seed,
    )


def final_count(config: RunConfig, section: CascadeSection | None) -> int:
    """How many samples `evaluate final` measures by default, of a run or of a cascade."""
    return config.eval.final_num_samples if section is None else section.num_samples


def checked_settings(
    config: CascadeConfig, index: int, stages: Sequence[StageConfig], **choices: Sequence[Any]
) -> list[Setting]:
    """`make_settings` of the choices, each checked to make a good cascade.

    `stages` are the cascade's first, at least up to the one that is swept: all of them if the
    best cascade is to be written. Raises UserError if the stage has nothing to choose, or a
    setting is impossible.
    """
    section, stage = config.cascade, stages[index]
    if index == 0 and (choices.get("aug_levels") or choices.get("truncated")):
        raise UserError(
            f"--aug_levels, --truncated: {stage.name!r} is a base model, without a low-res input"
        )
    if choices.get("truncated") and not stage.has_aug_level:
        raise UserError(
            f"--truncated: {stage.name!r} was trained with config.stage.augment.name ="
            f" {stage.augment.name!r} and has no level to truncate at"
        )
    settings = make_settings(section, index, stage, **choices)
    given = ", ".join(f"--{name}" for name in choices if choices[name]) or "`evaluate sweep`"
    for setting in settings:
        chosen = first_stages(with_setting(section, index, setting), len(stages))
        truncated = chosen.truncated and any(s.has_aug_level for s in stages)
        chosen = dataclasses.replace(chosen, truncated=truncated)
        try:
            values = schema.to_dict(dataclasses.replace(config, cascade=chosen))
            check_chain(cascade_config_from(values).cascade, stages)
        except UserError as e:
            raise UserError(f"{given}: {e}") from e
    return settings


def bound_chain(stage: StageConfig, num_steps: int | None = None) -> schema.SamplerConfig:
    """The chain whose variational bound is computed: ancestral, however the stage is sampled.

    By default it has all steps of the stage's process. Raises UserError if that has fewer.
    """
    steps = num_steps or stage.schedule.num_timesteps or 1000
    if (stage.schedule.discrete_timesteps or steps) < steps:
        raise UserError(
            f"--num_steps={steps}: expected at most {stage.schedule.discrete_timesteps}, the"
            f" config.stage.schedule.num_timesteps of {stage.name!r}"
        )
    return dataclasses.replace(
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


def open_runs_below(paths: Sequence[str], config: RunConfig) -> list[RunFolder]:
    """The runs of the stages below one that is evaluated, in order.

    Raises UserError if a run is missing or has no chosen checkpoint, or the stages are no chain.
    """
    folders = [RunFolder(path, flag="low_res_run") for path in paths]
    if not folders:
        return []
    given = f"--low_res_run={','.join(paths)}"
    configs = [folder.read_config() for folder in folders]
    if config.stage.kind != "super_resolution":
        raise UserError(
            f"{given}: only for super-resolution stages; the run to score,"
            f" {config.stage.name!r}, is a base model"
        )
    chain = [*configs, config]
    try:
        check_chain(chain_of(chain), [c.stage for c in chain])
    except UserError as e:
        raise UserError(f"{given}: {e}") from e
    for folder in folders:
        folder.chosen()
    return folders


def open_low_res_samples(path: str, stage: StageConfig, num_samples: int) -> StoredImages:
    """Stored images for a stage to enlarge.

    Raises UserError if they cannot be read, are of another size or kind, or fewer than
    `num_samples`; or if the stage enlarges nothing.
    """
    given = f"--low_res_samples={path}"
    if stage.kind != "super_resolution":
        raise UserError(f"{given}: {stage.name!r} is a base model, without a low-res input")
    stored = load_samples(path, stage, low_res=True)
    if (found := len(stored)) < num_samples:
        raise UserError(f"{given}: {found} images, expected the {num_samples} that are asked for")
    return stored
