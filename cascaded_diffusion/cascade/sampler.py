"""Samplers of one's own beside those of the config, and denoisers of one's own."""

import dataclasses

import jax
import numpy as np

from cascaded_diffusion.config.schema import SamplerConfig
from cascaded_diffusion.diffusion import grids, guidance, samplers
from cascaded_diffusion.diffusion.samplers import Step
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.types import DenoiseFn, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler of one's own: a step from one noise level to the next, and the times it visits.

    `step(denoise, at)` gets the network as a function `(xt [B, H, W, C], logsnr [B]) ->
    Prediction`, and a `Transition`: `xt`, `logsnr_t` and `logsnr_s`, standard normal `noise`. It
    returns the image at `logsnr_s` and the prediction. It is traced once; equal samplers share
    their compiled program, so `step` should be a function that is defined once.

        def euler(denoise, at):  # DDIM
            prediction = denoise(at.xt, at.logsnr_t)
            return diffuse(prediction.x0, at.logsnr_s, prediction.eps), prediction

        images = cascade.sample(labels=[3], samplers=[cd.Sampler(step=euler, num_steps=20)])
    """

    step: Step
    num_steps: int = 50
    grid: str = "uniform"  # one of `diffusion.grids.GRIDS`
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    threshold: str = "static"  # one of `diffusion.guidance.THRESHOLDS`
    threshold_percentile: float | None = None

    def __post_init__(self):
        for name, value, known in (
            ("grid", self.grid, grids.GRIDS),
            ("threshold", self.threshold, guidance.THRESHOLDS),
        ):
            if value not in known:
                raise UserError(f"{name} = {value!r}: expected one of {', '.join(known)}")
        if type(self.num_steps) is not int or self.num_steps < 1:
            raise UserError(f"num_steps = {self.num_steps!r}: expected a number of steps")
        if self.threshold == "dynamic" and self.threshold_percentile is None:
            raise UserError(
                "threshold_percentile = None: expected a share, for a dynamic threshold"
            )
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))


AnySampler = SamplerConfig | Sampler


def step_of(sampler: AnySampler) -> Step:
    """The step of a sampler, one's own or the config's."""
    if isinstance(sampler, Sampler):
        return sampler.step
    return samplers.make_step(
        sampler.name,
        variance=sampler.variance,
        variance_interpolation=sampler.variance_interpolation,
        eta=sampler.eta,
        churn=sampler.churn,
        num_steps=sampler.num_steps,
    )


def sample_chain(
    denoise: DenoiseFn,
    shape: tuple[int, int, int, int],
    *,
    schedule: Schedule,
    sampler: AnySampler,
    seed: int = 0,
) -> jax.Array:
    """Images [n, H, W, C] float32 of a denoiser of one's own, by a sampler of this package.

    Args:
      denoise: any function `(xt [n, H, W, C], logsnr [n]) -> Prediction`.
      shape: (n, H, W, C).
      schedule: `t -> logsnr`, of `diffusion.schedules`.
      sampler: of a config, or one's own. What it says of guidance and thresholds is not applied:
        the denoiser does that itself, if it is wanted.
      seed: of the noise, from 0 to 2^32 - 1.

    Raises UserError for a grid that is of discrete steps alone.

        schedule = make_cosine_schedule(offset=0.008)
        x = cd.sample_chain(denoise, (4, 16, 16, 3), schedule=schedule, sampler=sampler)
    """
    if sampler.grid in ("respaced", "ddim_respaced"):
        raise UserError(f"grid = {sampler.grid!r}: expected a grid of continuous time")
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(shape[0]))
    xt_keys, step_keys = (samplers.fold_in_each(keys, n) for n in range(2))
    times = grids.time_grid(
        sampler.grid, sampler.num_steps, schedule=schedule, discrete_timesteps=None
    )
    return samplers.sample(
        denoise,
        samplers.normal_per_image(xt_keys, tuple(shape[1:])),
        step_keys,
        schedule=schedule,
        step=step_of(sampler),
        times=times,
    )
