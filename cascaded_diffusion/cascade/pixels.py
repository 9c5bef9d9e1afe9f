r"""Conversions between stored pixels and the model's range.

(1)  float = uint8 / 127.5 - 1                        [0, 255] -> [-1, 1]
(2)  uint8 = round(clip((float + 1) * 127.5, 0, 255)), halves to even
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def float_from_uint8(image: jax.Array) -> jax.Array:
    """Eq. (1), float32."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def uint8_from_float(image: jax.Array) -> jax.Array:
    """Eq. (2). The caller excludes values that are not finite, which have no pixel value."""
    return jnp.round(jnp.clip((image + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def quantized(image: jax.Array) -> jax.Array:
    """`image` rounded to the 256 pixel values, float32 in [-1, 1], as if stored and read.

    The targets of a stage and the low-res input of the next one pass through this, whether they
    are generated or real, stored or not.
    """
    return float_from_uint8(uint8_from_float(image))
