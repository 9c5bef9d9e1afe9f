"""Sums over pixels, and adding what is the same for all of them.

XLA's CPU back end reduces over the outer axes of an array number by number: a sum over the
pixels of a feature map costs as much as a small convolution. As a product with ones it takes
a tenth of that. Other back ends have reductions of their own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# What a product adds up in a row: the more, the more digits are lost.
_PIXELS = 128


def _by_product(x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    rows = math.gcd(h, max(1, _PIXELS // w))
    x = x.reshape(b, h // rows, rows * w, c)
    return jnp.einsum("brn,brnc->brc", jnp.ones(x.shape[:3], x.dtype), x).sum(1)


def sum_pixels(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C]."""
    return jax.lax.platform_dependent(x, cpu=_by_product, default=lambda x: x.sum((1, 2)))


@jax.custom_vjp
def add_to_pixels(x: jax.Array, shift: jax.Array) -> jax.Array:
    """[B, H, W, C] plus [B, C], in the former's dtype; sums of the gradient are float32."""
    return x + shift.astype(x.dtype)[:, None, None, :]


def _forward(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Of the latter only the dtype is needed; it is small.
    return add_to_pixels(x, shift), shift


def _backward(shift: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy, sum_pixels(dy.astype(jnp.float32)).astype(shift.dtype)


add_to_pixels.defvjp(_forward, _backward)
