"""The blocks of the U-Net: residual, attention, resampling, patching.

The layout is NHWC throughout, which suits XLA on every back end. Parameters are float32;
`dtype` is the dtype of the computation.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp

from cascaded_diffusion.networks import initializers
from cascaded_diffusion.networks.kernels import convolution, winograd
from cascaded_diffusion.networks.kernels.attention import attention
from cascaded_diffusion.networks.kernels.dropout import kept
from cascaded_diffusion.networks.kernels.norms import EPSILON, GroupNorm, Parts
from cascaded_diffusion.networks.kernels.platforms import for_platform
from cascaded_diffusion.networks.kernels.sums import add_to_pixels, multiply_pixels
from cascaded_diffusion.types import PerDevice

# A feature map, or parts of one side by side, which together have its channels.
FeatureMap = jax.Array | Parts


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/patch, W/patch, patch * patch * C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // (patch * patch))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // (patch * patch))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], each pixel repeated."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def downsample_mean(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], means over 2x2 pixels."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def _convolved(
    layer: nn.Module,
    channels: int,
    window: tuple[int, ...],
    product: Callable[[jax.Array], jax.Array],
    shift: jax.Array | None = None,
) -> jax.Array:
    """`product` of a kernel [*window, channels, features] of `layer`, plus a bias and a shift."""
    init = initializers.zeros if layer.zero_init else initializers.fan_in_normal
    kernel = layer.param("kernel", init, (*window, channels, layer.features))
    bias = layer.param("bias", initializers.zeros, (layer.features,))
    y = product(kernel.astype(layer.dtype))
    # The bias stays in float32 until the sum: its gradient is a sum over the batch.
    return add_to_pixels(y, bias if shift is None else bias + shift)


class Conv3x3(nn.Module):
    """A 3x3 convolution, `stride` 1 or 2.

    A pixel of zeros is added on every side, or, if `pad_ends`, at the bottom and right alone.
    A `shift` [B, features] is added to all pixels of an example.
    """

    features: int
    dtype: jnp.dtype
    stride: int = 1
    zero_init: bool = False
    pad_ends: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        x = x.astype(self.dtype)

        def product(kernel: jax.Array) -> jax.Array:
            if self.stride == 1 and winograd.pays(x, kernel):
                return winograd.convolve(x, kernel)
            if self.pad_ends:
                return convolution.direct(x, kernel, self.stride, padding=(0, 1))
            return convolution.convolve(x, kernel, self.stride)

        return _convolved(self, x.shape[-1], (3, 3), product, shift)


def dense(features: int, dtype: jnp.dtype, name: str, *, zero_init: bool = False) -> nn.Dense:
    """A matrix and a bias on the last axis."""
    return nn.Dense(
        features,
        kernel_init=initializers.zeros if zero_init else initializers.fan_in_normal,
        dtype=dtype,
        name=name,
    )


class Conv1x1(nn.Module):
    """A 1x1 convolution, as a matrix product. [B, H, W, C] -> [B, H, W, features].

    The feature map may come in parts, side by side.
    """

    features: int
    dtype: jnp.dtype
    zero_init: bool = False

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        ends = list(itertools.accumulate(part.shape[-1] for part in parts))

        def product(kernel: jax.Array) -> jax.Array:
            kernels = jnp.split(kernel, ends[:-1])
            pieces = zip(parts, kernels, strict=True)
            return reduce(jnp.add, (multiply_pixels(x.astype(self.dtype), k) for x, k in pieces))

        return _convolved(self, ends[-1], (), product)


def concat_skip(h: jax.Array, skip: jax.Array, *, scale: bool) -> Parts:
    """Two feature maps [B, H, W, *] side by side, the second times 1/sqrt(2) if `scale`.

    On a GPU they stay two parts: a copy side by side would be written and read several times.
    """
    parts = (h, skip * math.sqrt(0.5) if scale else skip)
    return for_platform(gpu=lambda: parts, default=lambda: (jnp.concatenate(parts, -1),))()


def image_out(h: jax.Array, features: int, dtype: jnp.dtype, epsilon: float = EPSILON) -> jax.Array:
    """The end of a network: norm, swish, convolution. -> [B, H, W, features] float32.

    The output is float32 whatever `dtype` is, since the loss and the samplers subtract nearly
    equal numbers.
    """
    h = GroupNorm(dtype, swish=True, epsilon=epsilon, name="norm_out")(h).astype(jnp.float32)
    return Conv3x3(features, jnp.float32, name="conv_out", zero_init=True)(h)


class Dropout(nn.Module):
    """Dropout whose mask depends, example by example, on the example's number.

    The mask is therefore the same however a batch is cut into parts. `rows` are the numbers,
    int32 [B]; without them nothing is dropped.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is None or self.rate == 0.0:
            return x
        mask = kept(self.make_rng("dropout"), rows, x.shape[1:], self.rate)
        return jnp.where(mask, x / (1 - self.rate), 0).astype(x.dtype)


class ResBlock(nn.Module):
    """Residual block modulated by the embedding.

    [B, H, W, C], which may come in parts, and [B, E] -> [B, H, W, features]; `resample` halves
    H and W ("down", 2x2 averages) or doubles them ("up", nearest neighbour), on both branches and
    before the first convolution (Brock et al. 2019).
    """

    features: int
    dropout_rate: float = 0.0  # before the second convolution
    # Whether the embedding scales and shifts the second norm ("adaptive group normalization",
    # Dhariwal & Nichol 2021) or is added before it (Ho et al. 2020, SR3).
    scale_shift: bool = True
    resample: str | None = None
    # Whether the skip branch has a 1x1 convolution even if the number of channels stays the same.
    project_skip: bool = False
    dtype: jnp.dtype = jnp.float32
    epsilon: float = EPSILON  # of the norms

    @nn.compact
    def __call__(
        self, x: FeatureMap, embedding: jax.Array, rows: jax.Array | None = None
    ) -> jax.Array:
        features, dtype = self.features, self.dtype
        group_norm = partial(GroupNorm, dtype, swish=True, epsilon=self.epsilon)
        parts = x if isinstance(x, tuple) else (x,)
        h = group_norm(name="norm0")(*parts)
        if self.resample is not None:
            resample = {"down": downsample_mean, "up": upsample_nearest}[self.resample]
            h, parts = resample(h), tuple(map(resample, parts))
        changed = self.project_skip or h.shape[-1] != features
        conv, norm = Conv3x3(features, dtype, name="conv0"), group_norm(name="norm1")
        modulation = nn.swish(embedding)
        if self.scale_shift:
            modulation = dense(2 * features, dtype, "scale_shift", zero_init=True)(modulation)
            h = norm(conv(h), modulation=jnp.split(modulation, 2, axis=-1))
        else:
            h = norm(conv(h, shift=dense(features, dtype, "shift")(modulation)))

        h = Dropout(self.dropout_rate, name="dropout")(h, rows)
        h = Conv3x3(features, dtype, name="conv1", zero_init=True)(h)
        if changed:
            return Conv1x1(features, dtype, name="skip")(*parts) + h
        return jnp.concatenate(parts, -1) + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the N = H * W pixels of a feature map."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    per_device: PerDevice | None = None
    epsilon: float = EPSILON  # of the norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        norm = GroupNorm(self.dtype, epsilon=self.epsilon, name="norm")
        qkv = Conv1x1(3 * c, self.dtype, name="qkv")(norm(x))
        qkv = qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
        # The gradient of a split is one concatenation, that of indexing three padded sums.
        q, k, v = (part[:, :, 0] for part in jnp.split(qkv, 3, axis=2))
        attended = attention(q, k, v, self.per_device)
        out = Conv1x1(c, self.dtype, zero_init=True, name="out")
        return x + out(attended.reshape(b, h, w, c))


class Downsample(nn.Module):
    """Halves a feature map: a strided convolution, or 2x2 averages."""

    method: str
    dtype: jnp.dtype = jnp.float32
    pad_ends: bool = False  # see `Conv3x3`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.method == "conv":
            conv = Conv3x3(x.shape[-1], self.dtype, 2, pad_ends=self.pad_ends, name="conv")
            return conv(x)
        return downsample_mean(x)


class Upsample(nn.Module):
    """Doubles a feature map: nearest neighbour, then a convolution if `method` is "conv"."""

    method: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = upsample_nearest(x)
        return Conv3x3(x.shape[-1], self.dtype, name="conv")(x) if self.method == "conv" else x
