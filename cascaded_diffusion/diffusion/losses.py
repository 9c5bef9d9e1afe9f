r"""Training losses.

    (1)  L_simple = E_{t, eps} || target - network(xt, t) ||^2 / (H W C)

where the target is eps (Ho et al. 2020, eq. 14; the paper's choice), x0 or v. Time is drawn
uniformly, from {1/T, ..., T/T} for a process of T discrete steps and from (0, 1] for a
continuous one.

**Weighting.** Each of the three is an error of x0 in disguise,

    (2)  |eps error|^2 = snr |x0 error|^2,   |v error|^2 = (1 + snr) |x0 error|^2

so a weighting is a factor w(logsnr) of the x0 error, whatever is predicted:

    (3)  snr            w = snr                  (the eps loss; Ho et al. 2020)
    (4)  truncated_snr  w = max(snr, 1)          (Salimans & Ho 2022)
    (5)  min_snr        w = min(snr, 5)          (Hang et al. 2023, gamma = 5)
    (6)  sigmoid        w = snr sigmoid(2 - logsnr) (-dlogsnr/dt)
                        (Kingma & Gao 2023, whose last factor undoes the schedule's own
                        emphasis: the loss becomes an integral over logsnr)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.types import check_shape

# (logsnr, -dlogsnr/dt) -> log w.
Weighting = Callable[[jax.Array, jax.Array], jax.Array]

WEIGHTINGS: dict[str, Weighting] = {
    "snr": lambda logsnr, _: logsnr,
    "truncated_snr": lambda logsnr, _: jnp.maximum(logsnr, 0.0),
    "min_snr": lambda logsnr, _: jnp.minimum(logsnr, math.log(5.0)),
    "sigmoid": lambda logsnr, slope: logsnr + jax.nn.log_sigmoid(2.0 - logsnr) + jnp.log(slope),
}

# log of the factor between the predicted quantity's error and that of x0, eq. (2).
_LOG_ERROR_RATIO: dict[str, Callable[[jax.Array], jax.Array]] = {
    "eps": lambda logsnr: logsnr,
    "x0": jnp.zeros_like,
    "v": jax.nn.softplus,
}


def uniform_t(
    key: jax.Array, shape: tuple[int, ...], *, num_timesteps: int | None, max_t: float = 1.0
) -> jax.Array:
    """Uniform diffusion times in (0, max_t]; with `num_timesteps` = T, multiples of 1/T."""
    if num_timesteps is None:
        return max_t * (1.0 - jax.random.uniform(key, shape))
    last = math.floor(max_t * num_timesteps + 1e-6)
    return jax.random.randint(key, shape, 1, last + 1) / num_timesteps


def mean_per_example(x: jax.Array) -> jax.Array:
    """[B, ...] -> [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def simple_loss(
    output: jax.Array,
    x0: jax.Array,
    logsnr: jax.Array,
    eps: jax.Array,
    *,
    parameterization: str,
    weighting: str = "none",
    slope: jax.Array | None = None,
) -> jax.Array:
    """Eq. (1), weighted by eq. (3)-(6) unless `weighting` is "none": [B, H, W, C] -> [B].

    `slope` [B] is -dlogsnr/dt, from `schedules.slope_of`; eq. (6) alone needs it.
    """
    target = gaussian.target_from(x0, logsnr, eps, parameterization=parameterization)
    check_shape(output, "B H W C", "network output", **dict(zip("BHWC", x0.shape, strict=True)))
    loss = mean_per_example(jnp.square(output.astype(jnp.float32) - target))
    if weighting == "none":
        return loss
    log_weight = WEIGHTINGS[weighting](logsnr, slope) - _LOG_ERROR_RATIO[parameterization](logsnr)
    return jnp.exp(log_weight) * loss
