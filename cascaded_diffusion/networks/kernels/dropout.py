r"""Which numbers dropout keeps: a hash of the step, the example and the place.

For place i of an example, counted through its feature map, and two words a and b drawn from the
step's key and the example's row, in 32-bit unsigned arithmetic:

(1)  x = h(i + a),   h(x) = (x ^ (x >> 16)) m
(2)  y = f(x ^ b),   f(x) = z ^ (z >> 15),  z = (x ^ (x >> 15)) n

A number is kept if y < (1 - rate) 2^32. The multipliers m and n are those of a published search
for hashes in which every bit of the input flips every bit of the output half of the time. b
keeps examples apart whose counters i + a overlap.

JAX's own generator takes five times as many operations, and a form (halves of a counter, put
together afterwards) that XLA cannot compute inside the kernel that uses the mask: a training
step on a GPU wrote and read the mask and spent a thirtieth of its time on it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_M, _N = np.uint32(0x21F0AAAD), np.uint32(0xD35A2D97)


def kept(key: jax.Array, rows: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Which numbers of examples with the numbers `rows` [B] are kept: [B, *shape] bool."""
    words = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (2,)))(rows)
    a, b = (word.reshape(-1, *[1] * len(shape)) for word in words.T)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    place = sum(
        jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), axis + 1) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    x = place + a
    x = (x ^ (x >> 16)) * _M
    x ^= b
    x = (x ^ (x >> 15)) * _N
    x ^= x >> 15
    return x < jnp.uint32(round((1 - rate) * 2**32))
