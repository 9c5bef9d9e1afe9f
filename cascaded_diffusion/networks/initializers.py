"""Initial parameters, drawn all at once.

XLA takes a minute to compile hundreds of random draws, one per parameter. So the initializers
below take their numbers from one long draw, in the order in which the network is constructed.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# The standard deviation of a standard normal distribution truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978

zeros = nn.initializers.zeros_init()


class _Draw:
    """Hands out the numbers of a long draw; without `numbers` it only counts them."""

    def __init__(self, numbers: jax.Array | None = None):
        self._numbers = numbers
        self.taken = 0

    def take(self, shape: Sequence[int]) -> jax.Array:
        start, self.taken = self.taken, self.taken + math.prod(shape)
        if self._numbers is None:
            return jnp.zeros(shape)
        return jax.lax.slice(self._numbers, (start,), (self.taken,)).reshape(shape)


_draw: contextvars.ContextVar[_Draw | None] = contextvars.ContextVar("draw", default=None)


@contextlib.contextmanager
def _from(draw: _Draw) -> Iterator[None]:
    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)


def fan_in_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers within two standard deviations, of variance 1 / fan-in (LeCun et al. 1998).

    For a convolution's kernel or a matrix, whose last axis is the output. Outside
    `drawn_together` it draws from `key`.
    """
    fan_in, draw = math.prod(shape[:-1]), _draw.get()
    if draw is not None:
        return (draw.take(shape) / math.sqrt(fan_in)).astype(dtype)
    return _truncated_normal(key, shape).astype(dtype) / math.sqrt(fan_in)


def embedding_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Likewise, of variance 1 / E, for a table [K, E] of embeddings."""
    return fan_in_normal(key, shape, dtype) * math.sqrt(shape[0] / shape[1])


def _truncated_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape)) / _TRUNCATED_STD


def drawn_together(init: Callable[[], Any], key: jax.Array) -> Any:
    """Calls `init()` with all of its parameters taken from one draw of `key`."""
    count = _Draw()
    with _from(count):
        # A new function each time, since JAX does not trace a known one again.
        jax.eval_shape(lambda: init())
    with _from(_Draw(_truncated_normal(key, (count.taken,)))):
        return init()
