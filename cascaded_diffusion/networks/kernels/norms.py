r"""Group normalization, an affine map per example and swish, as one function with its gradient.

For x [B, H, W, C] in G groups of n = H W C / G numbers, with scale s and shift b [B, C]:

(1)  m = mean_g(x),  d = sqrt(mean_g(x^2) - m^2 + eps)              per example and group
(2)  u = x (s / d) + (b d - m s) / d                                per example and channel
(3)  y = u sigmoid(u), or u

The gradient, with g = dL/du and sums over pixels alone, both [B, C]:

(4)  db = sum g,   ds = (sum g x - m sum g) / d
(5)  dx = (g s - m1 - (x - m) m2 / d) / d,   m1 = sum_g(s db) / n,   m2 = sum_g(s ds) / n
(6)  dy/du = (1 + e + u e) / (1 + e)^2,   e = exp(-u)               for swish

Forward and backward each read the feature map twice: once elementwise, and once for sums over
pixels per channel, which are added up to groups afterwards, when they are small. x is the only
array of the feature map's size that is kept. The variance of (1) loses digits where a mean is
many deviations: at 10 of them the result is off by 1e-4, at 100 by 1e-2.

(2), (5) and (6) end in divisions because XLA's CPU back end computes an expression that ends in
a cheap operation again wherever it is used: a channel's number for each of its pixels, a whole
gradient for each use. It considers divisions expensive and keeps their results.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from cascaded_diffusion.networks.kernels.layouts import in_memory
from cascaded_diffusion.networks.kernels.platforms import for_platform
from cascaded_diffusion.networks.kernels.sums import sum_pixel_pairs, sum_pixels

EPSILON = 1e-5
Parts = tuple[jax.Array, ...]


def _over_groups(x: jax.Array, groups: int) -> jax.Array:
    """[B, C] -> [B, C]: for each channel, the sum over its group."""

    def by_product(x: jax.Array) -> jax.Array:
        member = jnp.arange(x.shape[1]) * groups // x.shape[1]
        return x @ (member[:, None] == member).astype(x.dtype)

    def by_reduction(x: jax.Array) -> jax.Array:
        b, c = x.shape
        sums = x.reshape(b, groups, c // groups).sum(-1, keepdims=True)
        return jnp.broadcast_to(sums, (b, groups, c // groups)).reshape(b, c)

    return for_platform(cpu=by_product, default=by_reduction)(x)


def _pixelwise(x: jax.Array) -> jax.Array:
    """[B, C] -> [B, 1, 1, C]."""
    return x[:, None, None, :]


def _channels(parts: Parts, *arrays: jax.Array) -> Iterator[tuple[jax.Array, ...]]:
    """Each part's channels of arrays [..., C]."""
    ends = list(itertools.accumulate((part.shape[-1] for part in parts), initial=0))
    for start, end in itertools.pairwise(ends):
        yield tuple(x[..., start:end] for x in arrays)


def _joined(parts: Iterable[jax.Array]) -> jax.Array:
    return jnp.concatenate(list(parts), -1)


def _statistics(parts: Parts, groups: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Eq. (1): m and d, [B, C] float32."""
    _, h, w, _ = parts[0].shape
    wide = [x.astype(jnp.float32) for x in parts]
    # Inside of the joining, one thread of a GPU would add up all pixels.
    pieces = in_memory([(sum_pixels(x), sum_pixels(x * x)) for x in wide])
    sums, squares = map(_joined, zip(*pieces, strict=True))
    count = h * w * sums.shape[-1] // groups
    mean, square = (_over_groups(x, groups) / count for x in (sums, squares))
    return mean, jnp.sqrt(jnp.maximum(square - mean * mean, 0.0) + epsilon)


def _affine(
    x: jax.Array, scale: jax.Array, shift: jax.Array, mean: jax.Array, sd: jax.Array
) -> jax.Array:
    """Eq. (2), float32."""
    a, b = scale / sd, (shift * sd - mean * scale) / sd
    return x.astype(jnp.float32) * _pixelwise(a) + _pixelwise(b)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    parts: Parts,
    scale: jax.Array,
    shift: jax.Array,
    groups: int,
    swish: bool,
    epsilon: float = EPSILON,
) -> jax.Array:
    """Eqs. (1) to (3) for x [B, H, W, C], in its dtype; computed in float32.

    `parts` are x, in pieces side by side. `scale` and `shift` are [B, C] float32, and `groups`
    divides C.
    """
    return _forward(parts, scale, shift, groups, swish, epsilon)[0]


def _forward(
    parts: Parts, scale: jax.Array, shift: jax.Array, groups: int, swish: bool, epsilon: float
) -> tuple[jax.Array, tuple[Parts, tuple[jax.Array, ...]]]:
    # What a jitted function hands back as it was given is another array to some versions of JAX.
    y, statistics = _normalized(parts, scale, shift, groups, swish, epsilon)
    return y, (parts, (scale, shift, *statistics))


@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _normalized(
    parts: Parts, scale: jax.Array, shift: jax.Array, groups: int, swish: bool, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    statistics = _statistics(parts, groups, epsilon)

    def normalized(x: jax.Array, own: tuple[jax.Array, ...]) -> jax.Array:
        u = _affine(x, *own)
        return (nn.swish(u) if swish else u).astype(x.dtype)

    affine = _channels(parts, scale, shift, *statistics)
    return _joined(map(normalized, parts, affine)), statistics


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _backward(
    groups: int,
    swish: bool,
    epsilon: float,
    saved: tuple[Parts, tuple[jax.Array, ...]],
    dy: jax.Array,
) -> tuple[Parts, jax.Array, jax.Array]:
    parts, affine = saved
    scale, _, mean, sd = affine
    _, h, w, c = dy.shape
    count = h * w * c // groups

    def slope_of(x: jax.Array, dy: jax.Array, *own: jax.Array) -> jax.Array:
        """g of (4) and (5), float32."""
        g = dy.astype(jnp.float32)
        if not swish:
            return g
        # Eq. (6). Below -40 it vanishes, and the square would overflow.
        u = jnp.maximum(_affine(x, *own), -40.0)
        e = jnp.exp(-u)
        return g * (1 + e + u * e) / jnp.square(1 + e)

    def sums(x: jax.Array, own: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        g = slope_of(x, *own)
        return sum_pixel_pairs(g, g * x.astype(jnp.float32))

    pieces = map(sums, parts, _channels(parts, dy, *affine))
    dshift, products = map(_joined, zip(*pieces, strict=True))
    dscale = (products - mean * dshift) / sd
    m1 = _over_groups(scale * dshift, groups) / count
    m2 = _over_groups(scale * dscale, groups) / count
    slope, constant = m2 / sd, (mean * m2 - m1 * sd) / sd
    # On a GPU, g is computed again: XLA would keep it in float32 for the second pass, and for a
    # third, into which it would merge these sums and those over the examples.
    (parts, dy, affine, slope, constant), dscale, dshift = in_memory(
        ((parts, dy, affine, slope, constant), dscale, dshift)
    )

    def gradient(x: jax.Array, own: tuple[jax.Array, ...]) -> jax.Array:
        dy, slope, constant, *affine = own
        scale, _, _, sd = affine
        g = slope_of(x, dy, *affine)
        wide = x.astype(jnp.float32)
        dx = g * _pixelwise(scale) - wide * _pixelwise(slope) + _pixelwise(constant)
        return (dx / _pixelwise(sd)).astype(x.dtype)

    pieces = _channels(parts, dy, slope, constant, *affine)
    return tuple(map(gradient, parts, pieces)), dscale, dshift


normalize.defvjp(_forward, _backward)


class GroupNorm(nn.Module):
    """Group normalization of [B, H, W, C] with gcd(32, C) groups, followed by swish if asked.

    `dtype` is the result's.
    """

    dtype: jnp.dtype = jnp.float32
    swish: bool = False
    epsilon: float = EPSILON

    @nn.compact
    def __call__(
        self, *parts: jax.Array, modulation: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """Normalizes the parts side by side, as one feature map.

        `modulation` is a scale and a shift [B, C] per example, applied after the norm's own.
        """
        b, c = len(parts[0]), sum(part.shape[-1] for part in parts)
        scale = self.param("scale", nn.initializers.ones_init(), (c,))
        shift = self.param("bias", nn.initializers.zeros_init(), (c,))
        if modulation is not None:
            by, plus = (value.astype(jnp.float32) for value in modulation)
            scale, shift = scale * (1 + by), shift * (1 + by) + plus
        scale, shift = (jnp.broadcast_to(v, (b, c)).astype(jnp.float32) for v in (scale, shift))
        parts = tuple(part.astype(self.dtype) for part in parts)
        return normalize(parts, scale, shift, math.gcd(32, c), self.swish, self.epsilon)
