"""The blocks of the U-Net: residual, attention, resampling, patching.

Layout is NHWC throughout, which is what XLA wants on every back end. Parameters
are float32; `dtype` is the dtype of the computation. Group statistics are always
float32 (flax promotes them).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# Last layers of blocks start at zero, so that every block starts as the identity.
ZERO_INIT = nn.initializers.zeros_init()


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


def group_norm(dtype: jnp.dtype, channels: int, name: str) -> nn.GroupNorm:
    """Group normalization with 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(num_groups=math.gcd(32, channels), epsilon=1e-5, dtype=dtype, name=name)


def conv3x3(
    features: int, dtype: jnp.dtype, name: str, *, stride: int = 1, zero_init: bool = False
) -> nn.Conv:
    """A 3x3 convolution, `stride` 1 or 2, padding 1 on every side."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
        kernel_init=ZERO_INIT if zero_init else nn.linear.default_kernel_init,
        dtype=dtype,
        name=name,
    )


class ResBlock(nn.Module):
    """Residual block whose second norm is scaled and shifted by the embedding.

    As in Dhariwal & Nichol 2021 ("adaptive group normalization").
    [B, H, W, C], [B, E] -> [B, H, W, features].
    """

    features: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, *, deterministic: bool) -> jax.Array:
        features, dtype = self.features, self.dtype
        h = nn.swish(group_norm(dtype, x.shape[-1], "norm0")(x))
        h = conv3x3(features, dtype, "conv0")(h)

        scale_shift = nn.Dense(2 * features, kernel_init=ZERO_INIT, dtype=dtype, name="scale_shift")
        scale, shift = jnp.split(scale_shift(nn.swish(embedding))[:, None, None, :], 2, axis=-1)
        h = group_norm(dtype, features, "norm1")(h) * (1 + scale) + shift

        h = nn.Dropout(self.dropout_rate)(nn.swish(h), deterministic=deterministic)
        h = conv3x3(features, dtype, "conv1", zero_init=True)(h)
        if x.shape[-1] != features:
            x = nn.Dense(features, dtype=dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the N = H * W pixels of a feature map."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        tokens = group_norm(self.dtype, c, "norm")(x).reshape(b, h * w, c)
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(tokens)
        qkv = qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
        attended = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        out = nn.Dense(c, kernel_init=ZERO_INIT, dtype=self.dtype, name="out")
        return x + out(attended.reshape(b, h * w, c)).reshape(b, h, w, c)


class Downsample(nn.Module):
    """Halves a feature map: a strided convolution, or 2x2 averages."""

    method: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.method == "conv":
            return conv3x3(x.shape[-1], self.dtype, "conv", stride=2)(x)
        return nn.avg_pool(x, (2, 2), strides=(2, 2))


class Upsample(nn.Module):
    """Doubles a feature map: nearest neighbour, then a convolution where asked."""

    method: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = upsample_nearest(x)
        return conv3x3(x.shape[-1], self.dtype, "conv")(x) if self.method == "conv" else x
