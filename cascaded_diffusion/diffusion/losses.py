r"""Training losses.

    (1)  L_simple = E_{t, eps} || target - network(xt, t) ||^2 / (H W C)

where the target is eps (Ho et al. 2020, eq. 14; the paper's choice), x0 or v.
Time is drawn uniformly: from {1/T, ..., T/T} where the process has T discrete
steps, from (0, 1] where it is continuous. One definition covers both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.types import check_shape


def uniform_t(key: jax.Array, shape: tuple[int, ...], *, num_timesteps: int | None) -> jax.Array:
    """Uniform diffusion times.

    Args:
      key: a typed PRNG key.
      shape: the shape of the result.
      num_timesteps: T, giving multiples of 1/T in [1/T, 1]; None for the
        continuous interval (0, 1].
    """
    if num_timesteps is None:
        return 1.0 - jax.random.uniform(key, shape)
    return jax.random.randint(key, shape, 1, num_timesteps + 1) / num_timesteps


def simple_loss(
    output: jax.Array,
    x0: jax.Array,
    logsnr: jax.Array,
    eps: jax.Array,
    *,
    parameterization: str,
) -> jax.Array:
    """Eq. (1), one value per example: [B, H, W, C] -> [B]."""
    target = gaussian.target_from(x0, logsnr, eps, parameterization=parameterization)
    check_shape(output, "B H W C", "network output", **dict(zip("BHWC", x0.shape, strict=True)))
    squared = jnp.square(output.astype(jnp.float32) - target)
    return jnp.mean(squared, axis=tuple(range(1, squared.ndim)))
