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


def downsample_mean(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], the means of 2x2 pixels."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


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


def concat_skip(h: jax.Array, skip: jax.Array, *, scale: bool) -> jax.Array:
    """Two feature maps [B, H, W, *] side by side, the second times 1/sqrt(2) if `scale`."""
    return jnp.concatenate([h, skip * math.sqrt(0.5) if scale else skip], axis=-1)


def image_out(h: jax.Array, features: int, dtype: jnp.dtype) -> jax.Array:
    """The end of a network: norm, swish, convolution. -> [B, H, W, features] float32.

    The output is float32 whatever the compute dtype: the loss and the samplers
    subtract nearly equal numbers.
    """
    h = nn.swish(group_norm(dtype, h.shape[-1], "norm_out")(h)).astype(jnp.float32)
    return conv3x3(features, jnp.float32, "conv_out", zero_init=True)(h)


class ResBlock(nn.Module):
    """Residual block steered by the embedding.

    Its second norm is scaled and shifted by it, as in Dhariwal & Nichol 2021
    ("adaptive group normalization"), or it is added before that norm, as in
    Ho et al. 2020 and SR3.
    [B, H, W, C], [B, E] -> [B, H, W, features], or with `resample` H and W halved
    ("down", 2x2 averages) or doubled ("up", nearest neighbour): on both branches,
    before the first convolution (Brock et al. 2019).

    Attributes:
      features: channels of the output.
      dropout_rate: dropout before the second convolution.
      scale_shift: the former of the two; else the latter.
      resample: None, "down" or "up".
      project_skip: whether the skip branch has a 1x1 convolution even where the
        number of channels stays.
      dtype: dtype of the computation.
    """

    features: int
    dropout_rate: float = 0.0
    scale_shift: bool = True
    resample: str | None = None
    project_skip: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, *, deterministic: bool) -> jax.Array:
        features, dtype = self.features, self.dtype
        h = nn.swish(group_norm(dtype, x.shape[-1], "norm0")(x))
        if self.resample is not None:
            resample = {"down": downsample_mean, "up": upsample_nearest}[self.resample]
            h, x = resample(h), resample(x)
        h = conv3x3(features, dtype, "conv0")(h)

        steer = nn.swish(embedding)[:, None, None, :]
        if self.scale_shift:
            dense = nn.Dense(2 * features, kernel_init=ZERO_INIT, dtype=dtype, name="scale_shift")
            scale, shift = jnp.split(dense(steer), 2, axis=-1)
            h = group_norm(dtype, features, "norm1")(h) * (1 + scale) + shift
        else:
            h = h + nn.Dense(features, dtype=dtype, name="shift")(steer)
            h = group_norm(dtype, features, "norm1")(h)

        h = nn.Dropout(self.dropout_rate)(nn.swish(h), deterministic=deterministic)
        h = conv3x3(features, dtype, "conv1", zero_init=True)(h)
        if self.project_skip or x.shape[-1] != features:
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
        return downsample_mean(x)


class Upsample(nn.Module):
    """Doubles a feature map: nearest neighbour, then a convolution where asked."""

    method: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = upsample_nearest(x)
        return conv3x3(x.shape[-1], self.dtype, "conv")(x) if self.method == "conv" else x
