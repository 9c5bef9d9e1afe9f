"""A cascade: stages in order of resolution, each fed by the one before it."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax

from cascaded_diffusion.cascade.sampler import AnySampler
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.diffusion.samplers import fold_in_each
from cascaded_diffusion.types import Params


@jax.jit
def keys_for(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key per sample, which depends on the sample's global index alone: [B] -> [B] keys."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


@lru_cache(maxsize=32)
def sampling_program(
    stage: Stage, sampler: AnySampler, low_res_is_noisy: bool
) -> Callable[..., jax.Array]:
    """`stage.sample`, compiled once for all parameters and levels, and for all equal stages."""
    return jax.jit(partial(stage.sample, sampler=sampler, low_res_is_noisy=low_res_is_noisy))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cascade:
    """N stages, sampled one after the other; one compiled program per stage.

    `truncated` says how a low-res input gets its `aug_level`: True stops the chain below at that
    level (paper, section 3.2), False lets it finish and noises its result (section 3.3).
    """

    # In order of resolution. The first may be None if their clean images are always `given`.
    stages: Sequence[Stage | None]
    samplers: Sequence[AnySampler]  # one per stage
    truncated: bool

    def _stop_t(self, index: int, aug_levels: Sequence[float]) -> float:
        """Where the chain of stage `index` ends; above 0 it passes on a noisy image."""
        there = 0 <= index < len(self.stages) - 1 and self.stages[index] is not None
        if self.truncated and there and self.stages[index + 1].config.has_aug_level:
            return aug_levels[index]
        return 0.0

    def sample(
        self,
        params: Sequence[Params | None],
        keys: jax.Array,
        label: jax.Array | None,
        aug_levels: Sequence[float],
        given: Sequence[jax.Array | None] = (),
    ) -> list[jax.Array]:
        """One image [B, H, W, C] per stage and key; keys come from `keys_for`.

        There is one level per enlargement. In a truncated cascade, images before a stage with a
        level are noisy, as that stage saw them. `given` are images of the first stages, which then
        do not run.
        """
        images = list(given)
        for i in range(len(images), len(self.stages)):
            images.append(
                sampling_program(
                    self.stages[i], self.samplers[i], self._stop_t(i - 1, aug_levels) > 0
                )(
                    params[i],
                    jax.jit(fold_in_each)(keys, i),  # every stage draws from its own branch
                    label=label,
                    low_res=images[-1] if i > 0 else None,
                    aug_level=aug_levels[i - 1] if i > 0 else None,
                    stop_t=self._stop_t(i, aug_levels),
                )
            )
        return images
