"""The choices that remain after training: how one stage of a cascade is sampled.

Conditioning augmentation is amortized over its strength, so the strength can be chosen after
training (paper, section 3.3). Steps, sampler and guidance are free as well. Nothing here needs a
device.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import (
    CascadeConfig,
    CascadeSection,
    SamplerConfig,
    StageConfig,
    sampler_named,
    to_dict,
)
from cascaded_diffusion.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to sample the stage.

    Attributes:
      sampler: its sampler.
      aug_level: of its low-res input; None for a base model.
      truncated: whether the chain below is stopped at that level.
    """

    sampler: SamplerConfig
    aug_level: float | None
    truncated: bool

    def describe(self) -> dict[str, Any]:
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
    if index > 0:
        levels = aug_levels or [section.aug_levels[index - 1]]
    # A base model has nothing to truncate. A stage without a level keeps the cascade's mode,
    # which concerns the stages below it.
    modes = list(truncated or [section.truncated]) if index > 0 else [False]
    return [
        Setting(
            sampler=dataclasses.replace(
                sampler_named(name, own, stage), num_steps=steps, guidance_scale=scale
            ),
            aug_level=level,
            truncated=mode,
        )
        for level, mode, name, steps, scale in itertools.product(
            levels,
            modes,
            samplers or [own.name],
            num_steps or [own.num_steps],
            guidance_scales or [own.guidance_scale],
        )
    ]


def with_setting(section: CascadeSection, index: int, setting: Setting) -> CascadeSection:
    """The cascade with `setting` for stage `index`."""
    levels = list(section.aug_levels)
    if index > 0:
        levels[index - 1] = setting.aug_level
    samplers = list(section.samplers)
    samplers[index] = setting.sampler
    truncated = setting.truncated if index > 0 else section.truncated
    return dataclasses.replace(
        section, aug_levels=tuple(levels), samplers=tuple(samplers), truncated=truncated
    )


def checked_settings(
    config: CascadeConfig, index: int, stages: Sequence[StageConfig], **choices: Sequence[Any]
) -> list[Setting]:
    """All combinations for stage `index`, each checked to make a good cascade.

    Args:
      config: the cascade.
      index: the place of the stage in it.
      stages: its first stages, at least up to this one: all of them if the best is to be written.
      **choices: of `make_settings`.

    Raises:
      UserError: the stage has nothing to choose, or a setting is impossible.
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
    for setting in settings:
        try:
            _check_cascade(config, with_setting(section, index, setting), stages)
        except UserError as e:
            given = ", ".join(f"--{name}" for name in choices if choices[name])
            raise UserError(f"{given or '--sweep'}: {e}") from e
    return settings


def _check_cascade(
    config: CascadeConfig, section: CascadeSection, stages: Sequence[StageConfig]
) -> None:
    """Checks the first stages of a cascade, those given, as a cascade of their own."""
    num_stages = len(stages)
    first = dataclasses.replace(
        section,
        stages=section.stages[:num_stages],
        configs=section.configs[:num_stages],
        samplers=section.samplers[:num_stages],
        aug_levels=section.aug_levels[: num_stages - 1],
        truncated=section.truncated and any(s.has_aug_level for s in stages),
    )
    values = to_dict(dataclasses.replace(config, cascade=first))
    check_chain(cascade_config_from(values).cascade, stages)
