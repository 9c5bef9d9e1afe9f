"""A cascade: stages in order of resolution, each fed by the one before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax

from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import SamplerConfig
from cascaded_diffusion.diffusion.samplers import fold_in_each
from cascaded_diffusion.types import Params


def keys_for(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key per sample, which depends on the sample's global index alone: [B] -> [B] keys."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cascade:
    """N stages, sampled one after the other; one compiled program per stage.

    Attributes:
      stages: in order of resolution. The first may be None if their clean images are always
        `given`, so that they never run.
      samplers: one per stage.
      truncated: how a low-res input gets its `aug_level`: True stops the chain below at that
        level (paper, section 3.2), False lets it finish and noises its result (section 3.3).
    """

    stages: Sequence[Stage | None]
    samplers: Sequence[SamplerConfig]
    truncated: bool

    def sample_stage(
        self,
        index: int,
        params: Params,
        keys: jax.Array,
        label: jax.Array | None,
        low_res: jax.Array | None,
        aug_level: jax.Array | float | None,
        stop_t: jax.Array | float,
    ) -> jax.Array:
        """Samples stage `index` alone. Pure; levels may be traced, so one program serves all."""
        return self.stages[index].sample(
            params,
            fold_in_each(keys, index),  # every stage draws from its own branch
            label=label,
            low_res=low_res,
            aug_level=aug_level if index > 0 else None,
            low_res_is_noisy=self._truncates(index - 1),
            stop_t=stop_t,
            sampler=self.samplers[index],
        )

    def _truncates(self, index: int) -> bool:
        """Whether stage `index` passes on a noisy image."""
        return (
            self.truncated
            and 0 <= index < len(self.stages) - 1
            and self.stages[index] is not None
            and self.stages[index + 1].config.has_aug_level
        )

    def make_sampler(self) -> Callable[..., list[jax.Array]]:
        """Returns `sample(params, keys, label, aug_levels, given=())`.

        It takes one tree of parameters per stage, [B] keys from `keys_for`, [B] labels and one
        level per enlargement, and returns one tensor [B, H, W, C] per stage. In a truncated
        cascade, images before a stage with a level are noisy, as that stage saw them. `given` are
        images of the first stages, which then do not run: without truncation, a search over
        levels needs them only once. Each stage is compiled once for all parameters and levels.
        """
        programs = [jax.jit(partial(self.sample_stage, i)) for i in range(len(self.stages))]

        def sample(
            params: Sequence[Params],
            keys: jax.Array,
            label: jax.Array | None,
            aug_levels: Sequence[float],
            given: Sequence[jax.Array] = (),
        ) -> list[jax.Array]:
            images = list(given)
            for i in range(len(images), len(programs)):
                stop_t = aug_levels[i] if self._truncates(i) else 0.0
                low_res = images[-1] if images else None
                level = aug_levels[i - 1] if i > 0 else 0.0
                images.append(programs[i](params[i], keys, label, low_res, level, stop_t))
            return images

        return sample
