r"""Noise schedules: `t -> logsnr`.

The forward process of a variance-preserving diffusion is

    (1)  q(xt | x0) = N(alpha_t x0, sigma_t^2 I),   alpha_t^2 + sigma_t^2 = 1
    (2)  logsnr_t   = log(alpha_t^2 / sigma_t^2)

with `t` in [0, 1]. A schedule with `T` discrete steps is the same curve read
at t = i / T: step `i` of `T` has alpha_t^2 = abar_i of the DDPM notation.

The cosine schedule (Nichol & Dhariwal 2021, "Improved DDPM", eq. 17) sets

    (3)  alpha_t^2 = f(t) / f(0),   f(t) = cos^2(pi/2 * (t + o) / (1 + o))

with offset o = 0.008. With a = pi/2 * (t + o) / (1 + o) and a0 its value at
t = 0, sigma_t^2 = (f(0) - f(t)) / f(0), and sin^2 a - sin^2 a0 factors, so

    (4)  logsnr_t = log cos^2(a) - log(sin(a + a0) sin(a - a0))

which keeps all its digits near t = 0, where 1 - alpha_t^2 would lose them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cascaded_diffusion.types import Schedule


def make_cosine_schedule(
    *, offset: float = 0.008, logsnr_min: float = -20.0, logsnr_max: float = 20.0
) -> Schedule:
    """The cosine schedule, eq. (4), cut to [logsnr_min, logsnr_max].

    Args:
      offset: `o` of eq. (3); keeps the first steps from being vanishingly small.
      logsnr_min: where the curve is cut at the noise end (t = 1 is -infinity).
      logsnr_max: where it is cut at the image end (t = 0 is +infinity).
    """
    a0 = math.pi / 2 * offset / (1 + offset)

    def logsnr_from_t(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        # a - a0 is computed first: it is exactly 0 at t = 0, and there the
        # logarithm is -inf, which the clip turns into logsnr_max.
        a_minus_a0 = math.pi / 2 * t / (1 + offset)
        log_alpha2 = 2 * jnp.log(jnp.abs(jnp.cos(a_minus_a0 + a0)))
        log_sigma2 = jnp.log(jnp.sin(a_minus_a0 + 2 * a0)) + jnp.log(jnp.sin(a_minus_a0))
        # Infinite ends minus finite ones: no nan can arise, since at t = 0 only
        # the second term is infinite and at t = 1 only the first.
        return jnp.clip(log_alpha2 - log_sigma2, logsnr_min, logsnr_max)

    return logsnr_from_t


SCHEDULES = {"cosine": make_cosine_schedule}
