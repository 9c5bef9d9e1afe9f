"""Sums over pixels, and adding what is the same for all of them.

XLA's CPU back end reduces over the outer axes of an array number by number: a sum over the
pixels of a feature map costs as much as a small convolution. There the sum over a row is
written out as additions of slices, which become one vectorized loop. Other back ends have
reductions of their own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_MAX_SLICES = 32


def _in_slices(x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    count = next(n for n in range(min(w, _MAX_SLICES), 0, -1) if w % n == 0)
    parts = x.reshape(b, h, w // count, count, c)
    row = functools.reduce(jnp.add, (parts[:, :, :, i] for i in range(count)))
    return row.sum((1, 2))


def sum_pixels(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C]."""
    return jax.lax.platform_dependent(x, cpu=_in_slices, default=lambda x: x.sum((1, 2)))


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
