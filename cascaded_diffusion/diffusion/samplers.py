r"""Samplers: from noise at t = 1 to an image at t = 0, or to any time between.

With the grid t_i = 1 - i / num_steps, every sampler repeats, for t = t_i and
s = t_{i+1}, one transition:

    (1)  ancestral   xs ~ q(xs | xt, x0 = x0_hat)            (gaussian eq. (5))
    (2)  DDIM        xs = alpha_s x0_hat + sigma_s eps_hat   (Song et al. 2021)

Truncation (Ho et al. 2021, section 3.2) stops the chain at t = stop_t > 0 and
returns the still noisy image: grid points below `stop_t` are never visited, the
last step ends on it exactly. `stop_t` may be traced, so that a sweep over
truncation levels compiles once; `num_steps` need not be the training T.

The noise of step i for an image comes from `fold_in(key of that image, i)`: an
image does not depend on the batch it is in, nor on how the batch is sharded.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.types import DenoiseFn, Prediction, Schedule

# (prediction, xt, logsnr_s, logsnr_t, noise) -> xs
Transition = Callable[[Prediction, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def ancestral_step(
    prediction: Prediction,
    xt: jax.Array,
    logsnr_s: jax.Array,
    logsnr_t: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Eq. (1) with the small (posterior) variance."""
    mean, var = gaussian.posterior(prediction.x0, xt, logsnr_s, logsnr_t)
    return mean + jnp.sqrt(var) * noise


def ddim_step(
    prediction: Prediction,
    xt: jax.Array,
    logsnr_s: jax.Array,
    logsnr_t: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Eq. (2), deterministic: `noise` is not used (and XLA never draws it)."""
    del xt, logsnr_t, noise
    return gaussian.diffuse(prediction.x0, logsnr_s, prediction.eps)


SAMPLERS: dict[str, Transition] = {"ancestral": ancestral_step, "ddim": ddim_step}


def normal_per_image(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, [B] keys -> [B, *shape], image by image."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample(
    denoise: DenoiseFn,
    xt: jax.Array,
    keys: jax.Array,
    *,
    schedule: Schedule,
    transition: Transition,
    num_steps: int,
    stop_t: jax.Array | float = 0.0,
) -> jax.Array:
    """Runs the reverse chain from t = 1 to t = stop_t as one compiled loop.

    Args:
      denoise: the network with everything but (xt, logsnr) closed over.
      xt: [B, H, W, C] noise at t = 1.
      keys: [B] typed PRNG keys, one per image.
      schedule: the process to sample.
      transition: one of `SAMPLERS`.
      num_steps: steps from t = 1 down to t = 0.
      stop_t: where to stop, in [0, 1); scalar, traced or not.

    Returns:
      [B, H, W, C], at noise level `stop_t`: the clean image where it is 0, not
      the slightly noisy x at the schedule's highest logsnr.
    """
    stop_t = jnp.asarray(stop_t, jnp.float32)
    batch = xt.shape[0]
    # The number of grid points above stop_t. The 1e-4 keeps rounding of a
    # stop_t that lies on the grid from adding a step of no length.
    steps_run = jnp.ceil((1.0 - stop_t) * num_steps - 1e-4).astype(jnp.int32)

    def body(i: jax.Array, xt: jax.Array) -> jax.Array:
        t = 1.0 - i / num_steps
        s = jnp.where(i + 1 == steps_run, stop_t, 1.0 - (i + 1) / num_steps)
        logsnr_t, logsnr_s = (jnp.full((batch,), schedule(u), jnp.float32) for u in (t, s))
        prediction = denoise(xt, logsnr_t)
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
        noise = normal_per_image(step_keys, xt.shape[1:])
        xs = transition(prediction, xt, logsnr_s, logsnr_t, noise)
        return jnp.where(s == 0.0, prediction.x0, xs)

    return jax.lax.fori_loop(0, steps_run, body, xt)
