r"""Embeddings of the scalars that condition a network.

A network is told the noise level as a number in [0, 1] (`NOISE_INPUTS`):

(1)  cosine_time:  u = arctan(exp(-logsnr / 2)) / (pi / 2)
     maps any schedule's noise level to the time of the offset-free cosine
     schedule with the same level (Salimans & Ho 2022)
(2)  noise_level:  u = alpha = sqrt(sigmoid(logsnr))
     the share of the image that is left, sqrt(alpha_bar) in DDPM's terms
     (WaveGrad, Chen et al. 2021; SR3, Saharia et al. 2021)

With either, a network does not depend on the schedule that trains or samples it.

(3)  sinusoidal(x) = [sin(1000 x w_k), cos(1000 x w_k)],
     w_k = 10000^(-k / (E/2)),  k = 0 .. E/2 - 1   (Vaswani et al. 2017;
     the factor 1000 puts x in [0, 1] on the scale of DDPM's time steps)
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from cascaded_diffusion.networks.layers import dense


def cosine_time(logsnr: jax.Array) -> jax.Array:
    """Eq. (1), elementwise."""
    return jnp.arctan(jnp.exp(-0.5 * logsnr)) / (math.pi / 2)


def noise_level(logsnr: jax.Array) -> jax.Array:
    """Eq. (2), elementwise."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr))


NOISE_INPUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine_time": cosine_time,
    "noise_level": noise_level,
}


def sinusoidal(x: jax.Array, size: int) -> jax.Array:
    """Eq. (3): [B] in [0, 1] -> [B, size] float32; `size` is even."""
    half = size // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * x.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
    """Embeds a scalar in [0, 1]: sinusoidal, dense, swish, dense. [B] -> [B, E]."""

    size: int
    sinusoids: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = sinusoidal(x, self.sinusoids)
        h = dense(self.size, self.dtype, "Dense_0")(h)
        return dense(self.size, self.dtype, "Dense_1")(nn.swish(h))
