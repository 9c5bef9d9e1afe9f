"""Initial parameters, drawn all at once.

XLA takes a minute to compile hundreds of random draws, one per parameter. So the initializers
below take their numbers from one long draw, in the order in which the network is constructed.
"""

import contextvars
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.types import Params

# The standard deviation of a standard normal distribution truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978

zeros = nn.initializers.zeros_init()

# Shape -> the next numbers of the long draw.
_Take = Callable[[Sequence[int]], jax.Array]
_take: contextvars.ContextVar[_Take | None] = contextvars.ContextVar("take", default=None)


def fan_in_normal(
    key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Normal numbers within two standard deviations, of variance 1 / fan-in (LeCun et al. 1998).

    For a convolution's kernel or a matrix, whose last axis is the output. Outside
    `drawn_together` it draws from `key`.
    """
    take = _take.get()
    numbers = _truncated_normal(key, shape) if take is None else take(shape)
    return (numbers / math.sqrt(math.prod(shape[:-1]))).astype(dtype)


def embedding_normal(
    key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Likewise, of variance 1 / E, for a table [K, E] of embeddings."""
    return fan_in_normal(key, shape, dtype) * math.sqrt(shape[0] / shape[1])


def _truncated_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape)) / _TRUNCATED_STD


def drawn_together(init: Callable[[], Params], key: jax.Array) -> Params:
    """Calls `init()` with all of its parameters taken from one draw of `key`."""

    def taking(take: _Take) -> Params:
        context = contextvars.copy_context()
        context.run(_take.set, take)
        return context.run(init)

    shapes: list[Sequence[int]] = []

    def note(shape: Sequence[int]) -> jax.Array:
        shapes.append(shape)
        return jnp.zeros(shape)

    # A new function each time, since JAX does not trace a known one again.
    jax.eval_shape(lambda: taking(note))
    sizes = [math.prod(shape) for shape in shapes]
    parts = iter(jnp.split(_truncated_normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1]))
    return taking(lambda shape: next(parts).reshape(shape))
